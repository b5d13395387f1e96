"""Settings of the whole suite: the same on every machine, and no network but what a test starts itself."""

import os

# Set before torch is imported, and inherited by the commands that tests start. On tiny models more threads only wait
# for each other, and on a busy machine they do so for long.
THREADS = 1
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import torch

torch.set_num_threads(THREADS)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

# The same examples in every run: a failure can be repeated, and a slow machine does not fail the suite.
hypothesis.settings.register_profile(
    "specattn",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("specattn")
