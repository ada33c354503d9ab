"""Robot arms as MuJoCo models from primitive shapes, and what a task needs to know to drive one."""
