import torch
from accelerate import Accelerator, debug_launcher
from safetensors.torch import load_file, save_file

from diffusers_ext.recipes.running_sums import RunningSums
from runs import forget_accelerate


NUM_BATCHES = 6


def add_batch(sums, number):
    sums.summand("count").add_(1)
    sums.summand("values").add_(torch.arange(6.0).view(2, 3) + number)


def add_a_part_of_the_batches(folder):
    """In each of several processes, over a checkpoint from which the run goes on; leaves the state in the folder."""
    forget_accelerate()  # of the process that this one was forked from
    accelerator = Accelerator(cpu=True)
    sums = RunningSums(accelerator, count=(), values=(2, 3))
    for number in range(accelerator.process_index, NUM_BATCHES, accelerator.num_processes):
        add_batch(sums, number)
        if number in (0, 1):
            sums.collect()
        if number in (2, 3):
            sums.collect()
            state = {name: value.clone() for name, value in sums.state_dict().items()}
            sums = RunningSums(accelerator, count=(), values=(2, 3))
            sums.load_state_dict(state)
    sums.collect()
    save_file(sums.state_dict(), folder / f"{accelerator.process_index}.safetensors")


def test_two_processes_have_the_sums_of_one(tmp_path):
    alone = RunningSums(None, count=(), values=(2, 3))
    for number in range(NUM_BATCHES):
        add_batch(alone, number)
    alone.collect()
    assert alone.count == NUM_BATCHES and alone.values[1].tolist() == [33.0, 39.0, 45.0]  # 6 (3, 4, 5) + 0 + ... + 5
    debug_launcher(add_a_part_of_the_batches, args=(tmp_path,), num_processes=2)
    for rank in range(2):
        state = load_file(tmp_path / f"{rank}.safetensors")
        assert state.keys() == {"count", "values"}
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in state.items())


def test_sums_start_again_after_a_line_of_the_log():
    sums = RunningSums(None, count=(), values=(2, 3))
    add_batch(sums, 1)
    sums.clear()
    assert sums.count == 0 and not sums.values.any()
