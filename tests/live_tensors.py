"""The most bytes of tensors alive at once: peak memory without the allocator's own habits."""

import itertools

from torch.profiler import ProfilerActivity, profile


def most_bytes(function):
    """The most that a call has alive at once, of what it made itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))
