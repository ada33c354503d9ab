"""ROS 2 nodes of robopolicy: the policy on an arm, recording, teleoperation and a simulated robot."""
