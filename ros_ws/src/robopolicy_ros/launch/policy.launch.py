"""A policy on an arm: ``ros2 launch robopolicy_ros policy.launch.py robot:=ur5e bundle:=…``"""

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
            DeclareLaunchArgument("bundle", description="folder of the policy"),
            DeclareLaunchArgument("engine", default_value="", description="engine of the bundle; empty: the only one"),
            DeclareLaunchArgument(
                "dry_run", default_value="false", description="true: commands go to ~/shadow/… and nothing moves"
            ),
            DeclareLaunchArgument("namespace", default_value="", description="of the node and its topics"),
            DeclareLaunchArgument(
                "params_file",
                default_value=PathJoinSubstitution([share, "config", "policy_node.yaml"]),
                description="parameters of the node; the arguments above win",
            ),
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
                executable="policy_node",
                name="policy",
                namespace=LaunchConfiguration("namespace"),
                output="screen",
                parameters=[
                    LaunchConfiguration("params_file"),
                    {
                        "robot": ParameterValue(LaunchConfiguration("robot"), value_type=str),
                        "bundle": ParameterValue(LaunchConfiguration("bundle"), value_type=str),
                        "engine": ParameterValue(LaunchConfiguration("engine"), value_type=str),
                        "dry_run": ParameterValue(LaunchConfiguration("dry_run"), value_type=bool),
                    },
                ],
            ),
        ]
    )
