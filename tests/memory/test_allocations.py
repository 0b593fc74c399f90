"""Changes of the allocator become levels, peaks and owners."""

import time

import torch

from coconut_ds.memory.allocations import BEFORE, Change, CpuRecorder, Mark, Timeline, gpu_changes, now

MARKS = [Mark(0, "forward"), Mark(100, "backward"), Mark(200, "idle")]


def test_every_phase_has_its_peak_and_the_highest_says_who_made_it():
    changes = [
        Change(10, 1, 100),  # forward: 100
        Change(20, 2, 50),  # 150
        Change(30, 2, -50),  # 100
        Change(110, 3, 80),  # backward: 180
        Change(120, 1, -100),  # 80
        Change(130, 3, -80),  # 0
    ]
    timeline = Timeline.of(changes, MARKS, offset=1000)
    assert timeline.peaks == [1150, 1180, 1000]
    assert (timeline.peak, timeline.peak_phase) == (1180, "backward")
    assert timeline.alive_at_peak == {BEFORE: 1000, "forward": 100, "backward": 80}
    assert timeline.points[-1] == (130e-9, 1000)


def test_what_an_older_phase_made_counts_in_the_next_from_its_start():
    timeline = Timeline.of([Change(10, 1, 100), Change(150, 1, -100)], MARKS)
    assert timeline.peaks == [100, 100, 0]


def test_an_address_that_is_used_again_belongs_to_the_new_phase():
    changes = [Change(10, 7, 10), Change(20, 7, -10), Change(110, 7, 30)]
    assert Timeline.of(changes, MARKS).alive_at_peak == {BEFORE: 0, "backward": 30}


def test_a_block_older_than_the_recording_may_go():
    timeline = Timeline.of([Change(10, 5, -40), Change(20, 6, 10)], MARKS, offset=100)
    assert timeline.peaks[0] == 100 and timeline.peak == 70


def test_long_recordings_are_thinned_without_losing_a_peak():
    changes = [Change(place, place, 1 if place % 2 else 3) for place in range(100)]
    changes += [Change(100 + place, place, -3) for place in range(0, 100, 2)]
    changes += [Change(1000 + n, 10_000 + n // 2, 5 if n % 2 == 0 else -5) for n in range(5000)]
    timeline = Timeline.of(changes, [Mark(0, "first"), Mark(1000, "second")])
    assert len(timeline.points) <= 2 * 50
    assert max(size for _, size in timeline.points) == timeline.peak == 200
    assert timeline.points == sorted(timeline.points)


def test_the_cpu_allocator_is_heard():
    recorder = CpuRecorder()
    recorder.start()
    marks = [now("one")]
    kept = torch.zeros(1000, dtype=torch.float64)
    time.sleep(0.002)
    marks.append(now("two"))
    gone = torch.zeros(5000, dtype=torch.float64)
    del gone
    changes = recorder.stop()
    timeline = Timeline.of(changes, marks)
    assert timeline.peaks == [8000, 48000]
    assert timeline.alive_at_peak == {BEFORE: 0, "one": 8000, "two": 40000}
    assert sum(change.size for change in changes) == kept.nbytes


def test_a_cuda_trace_tells_the_same():
    trace = [
        {"action": "segment_alloc", "addr": 1, "size": 2**21, "time_us": 1},
        {"action": "alloc", "addr": 1, "size": 512, "time_us": 2},
        {"action": "free_requested", "addr": 1, "size": 512, "time_us": 3},
        {"action": "free_completed", "addr": 1, "size": 512, "time_us": 4},
    ]
    assert list(gpu_changes(trace)) == [Change(2000, 1, 512), Change(3000, 1, -512)]
