"""From observations to commands in real time, without ROS and without torch.

Streams enter an `ObservationBuffer`, an inference worker turns observations into action chunks, a `ChunkScheduler`
turns chunks into a plan, the `Runner` follows the plan at the command rate, and the `SafetyFilter` is the last thing
that a command passes. Time is integer nanoseconds of a `Clock`, so that every rule runs under a simulated clock too.
"""
