"""What a run will cost, before it is started.

In reading order: ``memory_plan`` (memory of one rank), ``activation_memory`` (of a forward and backward pass, on fake
tensors), ``step_timing`` (where a step's time goes), ``loading_speed`` (how many cores feed how many GPUs).
"""
