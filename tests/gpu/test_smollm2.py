"""A real model: the GPU engine in float32 says what the CPU engine says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semipd import Engine, SamplingParams
from semipd.config import PolicyName

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "List three reasons to learn a new language:\n1.",
    "2, 4, 8, 16,",
    "Why is the sky blue? " * 40,
]


@pytest.mark.parametrize("policy", ["static", "exclusive"])
def test_text_equals_that_of_the_cpu_engine(smollm2_path: Path, policy: PolicyName) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=48)
    texts = {}
    for device in ("cpu", "cuda"):
        with Engine(str(smollm2_path), device=device, dtype="float32", policy=policy, max_model_len=1024) as engine:
            texts[device] = [output.outputs[0].text for output in engine.generate(PROMPTS, params)]
    assert texts["cuda"] == texts["cpu"]
