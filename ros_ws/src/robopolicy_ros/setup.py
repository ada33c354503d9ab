from pathlib import Path

from setuptools import find_packages, setup

package = "robopolicy_ros"
share = f"share/{package}"


def installed(folder: str) -> list[tuple[str, list[str]]]:
    """The files below a folder, as ``data_files`` wants them: by folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [
        (f"{share}/{parent}", [str(f) for f in files if f.parent == parent]) for parent in {f.parent for f in files}
    ]


setup(
    name=package,
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{package}"]),
        (share, ["package.xml"]),
        *installed("launch"),
        *installed("config"),
    ],
    install_requires=["setuptools"],
    zip_safe=False,
    description="ROS 2 nodes of robopolicy: a policy on an arm, recording, teleoperation and a simulated robot.",
    license="Apache-2.0",
    maintainer="robopolicy maintainers",
    maintainer_email="maintainers@robopolicy.example",
    tests_require=["pytest"],
    entry_points={
        "console_scripts": [
            "policy_node = robopolicy_ros.policy_node:main",
            "monitor_node = robopolicy_ros.monitor_node:main",
            "recorder_node = robopolicy_ros.recorder_node:main",
            "sim_robot_node = robopolicy_ros.sim_robot_node:main",
            "teleop_node = robopolicy_ros.teleop_node:main",
            "calibrate_latency = robopolicy_ros.calibrate_latency:main",
            "so101_driver_node = robopolicy_ros.so101_driver_node:main",
            "gripper_action_node = robopolicy_ros.gripper_action_node:main",
            "collect = robopolicy_ros.collect:main",
            "evaluate = robopolicy_ros.evaluate:main",
            "bag = robopolicy_ros.bag:main",
        ]
    },
)
