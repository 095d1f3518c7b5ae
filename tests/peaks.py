"""What a step allocates at most on the CPU, byte for byte: from the events of PyTorch's allocator, not from the process."""

from torch.profiler import ProfilerActivity, profile


def allocated_peak(step) -> int:
    """The largest sum of allocated tensors while `step()` runs, beyond those there were before, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
