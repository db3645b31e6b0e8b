"""Memory of a training step of a 7B model on one v5e chip, by the TPU compiler's count.

The shape of Llama-2-7B is compiled by `make test-plans` only, which sets ``JAXTUNE_TEST_FULL``.
"""

import json
import os
from pathlib import Path

import pytest

from jaxtune.config import resolve
from jaxtune.parallel.devices import GIB
from jaxtune.planning import plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_fully")]

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
DEEPSEEK_7B = json.loads((CONFIGS / "deepseek-llm-7b.json").read_text())
# The shape of Llama-2-7B, of which other tools publish what they need.
LLAMA_2_7B = DEEPSEEK_7B | {"num_hidden_layers": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5}


# The bars are a little above what was measured: 5.45 and 4.60 GiB.
MOST = [pytest.param(DEEPSEEK_7B, 5.5, id="deepseek")]
if "JAXTUNE_TEST_FULL" in os.environ:
    MOST += [pytest.param(LLAMA_2_7B, 4.7, id="llama-2")]


@pytest.mark.parametrize("model, most", MOST)
def test_qlora_over_nf4(tmp_path, model, most):
    (tmp_path / "config.json").write_text(json.dumps(model))
    sections = {
        "model": {"path": str(tmp_path)},
        "data": {"max_length": 1024},
        "training": {"batch_size": 1, "remat": "full"},
        "adapter": {"rank": 8},
        "quantize": {"format": "nf4"},
    }
    result = plan(resolve(sections), "v5e:1x1")
    print(result.render())
    assert result.fits
    assert sum(result.arguments.values()) + result.temporaries <= most * GIB
