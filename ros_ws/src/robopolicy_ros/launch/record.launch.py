"""Recording episodes: ``ros2 launch robopolicy_ros record.launch.py robot:=ur5e dataset:=…``"""

from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable
from launch.substitutions import EnvironmentVariable, LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription

DDS_PROFILE = "FASTDDS_DEFAULT_PROFILES_FILE"


def generate_launch_description() -> LaunchDescription:
    share = FindPackageShare("robopolicy_ros")
    return LaunchDescription(
        [
            DeclareLaunchArgument("robot", description="name of an arm (fr3, ur5e, so101) or folder of its contract"),
            DeclareLaunchArgument("dataset", description="folder of the dataset"),
            DeclareLaunchArgument("append", default_value="false", description="true: add to a dataset that exists"),
            DeclareLaunchArgument("task", default_value="", description="instruction of the episodes"),
            DeclareLaunchArgument(
                "policy_state",
                default_value="",
                description="/policy/state where a policy drives, to tell who did",
            ),
            DeclareLaunchArgument("bag", default_value="", description="folder of a rosbag2 to write as well"),
            DeclareLaunchArgument("namespace", default_value="", description="of the node and its topics"),
            DeclareLaunchArgument(
                "dds_profile",
                default_value=EnvironmentVariable(
                    DDS_PROFILE, default_value=PathJoinSubstitution([share, "config", "fastdds.xml"])
                ),
                description="profile of Fast DDS; with its defaults raw images get lost",
            ),
            SetEnvironmentVariable(DDS_PROFILE, LaunchConfiguration("dds_profile")),
            Node(
                package="robopolicy_ros",
                executable="recorder_node",
                name="recorder",
                namespace=LaunchConfiguration("namespace"),
                output="screen",
                parameters=[
                    {
                        "robot": ParameterValue(LaunchConfiguration("robot"), value_type=str),
                        "dataset": ParameterValue(LaunchConfiguration("dataset"), value_type=str),
                        "append": ParameterValue(LaunchConfiguration("append"), value_type=bool),
                        "task": ParameterValue(LaunchConfiguration("task"), value_type=str),
                        "policy_state": ParameterValue(LaunchConfiguration("policy_state"), value_type=str),
                        "bag": ParameterValue(LaunchConfiguration("bag"), value_type=str),
                    }
                ],
            ),
        ]
    )
