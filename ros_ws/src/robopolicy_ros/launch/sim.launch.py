"""A simulated arm in the place of a robot: ``ros2 launch robopolicy_ros sim.launch.py task:=drawer_close``"""

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
            DeclareLaunchArgument("task", description="short name of a simulated task, or a Gymnasium id"),
            DeclareLaunchArgument(
                "robot",
                default_value=PathJoinSubstitution([share, "config", "sim_ur5e_drawer_close"]),
                description="folder of the simulated robot's contract.yaml and safety.yaml",
            ),
            DeclareLaunchArgument(
                "options", default_value='{"arm": "ur5e"}', description="options of the task as JSON, e.g. its arm"
            ),
            DeclareLaunchArgument("seed", default_value="0", description="start of the first episode"),
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
                executable="sim_robot_node",
                name="sim_robot",
                namespace=LaunchConfiguration("namespace"),
                output="screen",
                parameters=[
                    {
                        "robot": ParameterValue(LaunchConfiguration("robot"), value_type=str),
                        "task": ParameterValue(LaunchConfiguration("task"), value_type=str),
                        "options": ParameterValue(LaunchConfiguration("options"), value_type=str),
                        "seed": ParameterValue(LaunchConfiguration("seed"), value_type=int),
                    }
                ],
            ),
        ]
    )
