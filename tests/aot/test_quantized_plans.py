"""Memory of a training step of a 7B model on one v5e chip, by the TPU compiler's count."""

import json
from pathlib import Path

import pytest

from jaxtune.config import resolve
from jaxtune.planning import plan
from jaxtune.planning.devices import GIB

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_fully")]

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
DEEPSEEK_7B = json.loads((CONFIGS / "deepseek-llm-7b.json").read_text())
# The shape of Llama-2-7B, of which other tools publish what they need.
LLAMA_2_7B = DEEPSEEK_7B | {"num_hidden_layers": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5}


@pytest.fixture
def resident_and_temporary(tmp_path):
    """Plans a run with 1024 tokens a row for one chip, prints the plan, returns its bytes."""

    def make(model, rows, **sections):
        (tmp_path / "config.json").write_text(json.dumps(model))
        sections |= {
            "model": {"path": str(tmp_path)},
            "data": {"max_length": 1024},
            "training": {"batch_size": rows, "remat": "full"},
        }
        result = plan(resolve(sections), "v5e:1x1")
        print(result.render())
        assert result.fits
        return sum(result.arguments.values()) + result.temporaries

    return make


# The bars are a little above what was measured: 4.60 and 5.45 GiB.
@pytest.mark.parametrize(
    "model, most",
    [pytest.param(LLAMA_2_7B, 4.7, id="llama-2"), pytest.param(DEEPSEEK_7B, 5.5, id="deepseek")],
)
def test_qlora_over_nf4(resident_and_temporary, model, most):
    taken = resident_and_temporary(model, 1, adapter={"rank": 8}, quantize={"format": "nf4"})
    assert taken <= most * GIB


def test_lora_over_bfloat16(resident_and_temporary):
    assert resident_and_temporary(DEEPSEEK_7B, 4, adapter={"rank": 8}) <= 15.5 * GIB
