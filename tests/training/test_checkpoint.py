"""What is staged is what is saved and read back: by one rank or two, whole or split, whatever the store does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nexa_train.artifact.manifest import ManifestDraft
from nexa_train.artifact.publish import Publisher, committed_folders, fetch, read_manifest
from nexa_train.errors import (
    AlreadyExistsError,
    ConfigError,
    ForeignError,
    NexaError,
    NotFoundError,
    RefusedError,
    SupersededError,
)
from nexa_train.rundir import RunDir
from nexa_train.store import Store
from nexa_train.store.base import Stored
from nexa_train.store.local import LocalStore

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nexa_train.backends.base import Staged
    from nexa_train.checkpoint import Saved, Saver, TorchState

pytestmark = pytest.mark.training

SHAPES = {"embed.weight": (5, 4), "layer.weight": (4, 4), "norm.weight": (1,), "last.bias": (7,)}
"""Rows that two ranks cannot share evenly, and a tensor of which the second rank has nothing."""

RUN = "run"


class Watched(LocalStore):
    """A folder that lets a test look on: `before` is called with the key of every object that is to be created."""

    def __init__(self, root: Path, before: Callable[[str], None] = lambda key: None) -> None:
        super().__init__(root)
        self.before = before

    def create(self, key: str, source: bytes | Path) -> Stored:
        self.before(key)
        return super().create(key, source)


def make_model() -> nn.Module:
    """Parameters of `SHAPES`."""
    import torch
    from torch import nn

    torch.manual_seed(3)
    model = nn.Module()
    for name, shape in SHAPES.items():
        child, _, leaf = name.partition(".")
        module = nn.Module()
        module.register_parameter(leaf, nn.Parameter(torch.randn(shape)))
        model.add_module(child, module)
    return model


def make_state(
    model: nn.Module, *, optimizer: str = "AdamW", rank: int = 0, world: int = 1, steps: int = 2
) -> TorchState:
    """A model and an optimiser that took some steps."""
    import torch

    from nexa_train.checkpoint import TorchState

    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        for parameter in model.parameters():
            # The same gradient for any number of ranks.
            whole = torch.randn(parameter.shape)
            parameter.grad = whole if world == 1 else placed_like(whole, parameter)
        made.step()
    return TorchState(model, made, adapter=False, rank=rank, world=world)


def placed_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as `parameter` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def make_saver(folder: Path, store: Store, **settings: Any) -> Saver:
    """A saver into `store`, with a run folder below `folder`."""
    from nexa_train.checkpoint import Saver

    return Saver(Publisher(store, RUN, "a0", nonce="0000"), RunDir(folder / "rundir"), **settings)


def save(saver: Saver, staged: Staged, small: dict[str, bytes] | None = None) -> str:
    """Save, wait, and return the digest of the weights."""
    saver.start(staged, small or {"config.json": b"{}"}, ManifestDraft(config={}))
    done = saver.wait()
    assert done is not None
    return done.checkpoint.weights_digest


def fetched(store: Store, step: int, into: Path) -> Saved:
    """A committed step, downloaded."""
    from nexa_train.checkpoint import Saved

    return Saved(fetch(store, read_manifest(store, f"checkpoints/{RUN}/step-{step:08d}"), into))


def tensors_of(state: TorchState) -> dict[str, Tensor]:
    """Weights and optimiser as they are now, copied."""
    staged = state.stage(1).ready()
    return {name: piece.tensor.clone() for name, piece in {**staged.weights, **staged.optimizer}.items()}


def assert_equal(saved: Saved, expected: dict[str, Tensor]) -> None:
    """To the last bit."""
    import torch

    assert saved.names == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved.whole(name), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
def test_what_is_saved_comes_back_to_the_last_bit_and_training_goes_on_with_the_same_bits(
    tmp_path: Path, optimizer: str
) -> None:
    import torch

    store = LocalStore(tmp_path / "store")
    before = make_state(make_model(), optimizer=optimizer)
    save(make_saver(tmp_path, store), before.stage(2))
    saved = fetched(store, 2, tmp_path / "fetched")
    assert saved.step == 2
    assert_equal(saved, tensors_of(before))
    after = make_state(make_model(), optimizer=optimizer, steps=0)
    after.restore(saved)
    for state in (before, after):
        for parameter in state.causal.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
    for name, tensor in tensors_of(before).items():
        torch.testing.assert_close(tensors_of(after)[name], tensor, rtol=0, atol=0)


def test_the_digest_depends_on_the_weights_alone_and_can_be_computed_from_its_definition(tmp_path: Path) -> None:
    state = make_state(make_model())
    digests = {
        save(make_saver(tmp_path / str(limit), LocalStore(tmp_path / str(limit)), shard_bytes=limit), state.stage(1))
        for limit in (1, 100, 1 << 30)
    }
    lines = [
        [name, "F32", list(shape), hashlib.sha256(tensors_of(state)[name].numpy().tobytes()).hexdigest()]
        for name, shape in sorted(SHAPES.items())
    ]
    assert digests == {hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()}


def test_what_does_not_fit_a_file_is_split_as_transformers_splits_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state, store = make_state(make_model()), LocalStore(tmp_path / "store")
    save(make_saver(tmp_path, store, shard_bytes=90), state.stage(1))
    assert_equal(fetched(store, 1, tmp_path / "fetched"), tensors_of(state))
    index = json.loads((tmp_path / "fetched/model.safetensors.index.json").read_text())
    found = {path.name: set(load_file(path)) for path in (tmp_path / "fetched").glob("model-*-of-00003.safetensors")}
    assert found.keys() == {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    assert index["weight_map"] == {name: file for file, names in found.items() for name in names}
    assert index["metadata"]["total_size"] == 4 * (20 + 16 + 1 + 7)


def test_transformers_loads_a_split_checkpoint(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from nexa_train.checkpoint import model_files

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes))
    store = LocalStore(tmp_path / "store")
    save(make_saver(tmp_path, store, shard_bytes=4000), make_state(model).stage(1), model_files(model))
    folder = next((tmp_path / "store").glob("checkpoints/*/*/data/*"))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_an_adapter_stays_in_the_one_file_that_peft_reads(tmp_path: Path) -> None:
    state, store = make_state(make_model()), LocalStore(tmp_path / "store")
    save(make_saver(tmp_path, store, shard_bytes=100), state.stage(1), {"adapter_config.json": b"{}"})
    saved = fetched(store, 1, tmp_path / "fetched")
    assert_equal(saved, tensors_of(state))
    assert sorted(path.name for path in saved.folder.glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_peft_loads_an_adapter_by_itself_with_the_base_that_it_names(tmp_path: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from nexa_train.checkpoint import TorchState, adapter_files
    from nexa_train.models.locate import Located

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    causal.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted, ids = get_peft_model(causal, config), torch.arange(8)[None]
    described = adapter_files(config, Located(tmp_path / "base", None, "folder base sha256:0"))
    store = LocalStore(tmp_path / "store")
    optimizer = torch.optim.SGD([weight for weight in causal.parameters() if weight.requires_grad])
    state = TorchState(causal, optimizer, adapter=True, rank=0, world=1)
    save(make_saver(tmp_path, store), state.stage(1), described)
    folder = next((tmp_path / "store").glob("checkpoints/*/*/data/*"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    assert torch.equal(loaded(ids).logits, adapted.eval()(ids).logits)
    with adapted.disable_adapter():
        assert not torch.equal(loaded(ids).logits, adapted(ids).logits)


def test_an_adapter_names_its_base_as_peft_looks_for_it() -> None:
    from peft import LoraConfig

    from nexa_train.checkpoint import adapter_files
    from nexa_train.models.locate import TINY_TOKENIZER, Located
    from nexa_train.registry import MODELS

    bases = {
        ("a/b", "c"): Located(Path("/cache/a"), None, "hub a/b@c", hub_id="a/b", revision="c"),
        ("/models/a", None): Located(Path("/models/a"), None, "folder a sha256:0"),
        (None, None): Located(TINY_TOKENIZER, MODELS["tiny"].architecture, "scratch"),
    }
    for expected, located in bases.items():
        said = json.loads(adapter_files(LoraConfig(), located)["adapter_config.json"])
        assert (said["base_model_name_or_path"], said["revision"]) == expected


def test_training_goes_on_while_a_slow_store_saves_and_the_bits_are_those_of_the_moment(tmp_path: Path) -> None:
    import torch

    may_write = threading.Event()
    store = Watched(tmp_path / "store", lambda key: None if may_write.wait(60) else pytest.fail("never released"))
    state = make_state(make_model())
    expected = tensors_of(state)
    saver = make_saver(tmp_path, store)
    staged = state.stage(1)
    saver.start(staged, {"config.json": b"{}"}, ManifestDraft(config={}))
    for parameter in state.causal.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    assert not saver.is_done
    with pytest.raises(AssertionError):  # one at a time: the next would overwrite what is being written
        saver.start(staged, {}, ManifestDraft(config={}))
    may_write.set()
    assert saver.wait() is not None
    assert saver.wait() is None
    assert_equal(fetched(store, 1, tmp_path / "fetched"), expected)


def test_the_optimiser_does_not_move_before_all_is_copied() -> None:
    import torch

    state, may_copy = make_state(make_model()), threading.Event()
    expected = tensors_of(state)
    state.buffers.thread.submit(may_copy.wait, 60)  # ahead of the copy
    staged = state.stage(1)
    for parameter in state.causal.parameters():
        parameter.grad = torch.ones_like(parameter)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(state.optimizer.step)
        with pytest.raises(TimeoutError):
            step.result(0.2)
        may_copy.set()
        step.result(60)
    for name, piece in {**staged.weights, **staged.optimizer}.items():
        assert torch.equal(piece.tensor, expected[name])
    for name, tensor in tensors_of(state).items():
        assert not torch.equal(tensor, expected[name])


def test_memory_is_used_again_by_the_next_save(tmp_path: Path) -> None:
    state = make_state(make_model())
    first, second = state.stage(1), state.stage(2)
    for name, piece in {**first.weights, **first.optimizer}.items():
        other = {**second.weights, **second.optimizer}[name]
        assert piece.tensor.data_ptr() == other.tensor.data_ptr()


@pytest.mark.parametrize("failing", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_store_that_refuses_fails_the_save_with_its_own_words_and_commits_nothing(
    tmp_path: Path, failing: str
) -> None:
    def refuse(key: str) -> None:
        if key.endswith(failing):
            raise RefusedError(f"no room for {failing}")

    store = Watched(tmp_path / "store", refuse)
    saver = make_saver(tmp_path, store)
    with pytest.raises(RefusedError, match=f"no room for {failing}"):
        save(saver, make_state(make_model()).stage(1))
    assert committed_folders(store, RUN) == []
    assert list((tmp_path / "rundir").glob("save-*")) == []
    # Once the commit was tried it may have come about, whatever was answered.
    assert bool(store.list()) == (failing == "manifest.json")
    store.before = lambda key: None
    save(saver, make_state(make_model()).stage(1))
    assert len(committed_folders(store, RUN)) == 1


def test_what_cannot_be_taken_back_hides_no_cause(tmp_path: Path) -> None:
    class Kept(Watched):
        def delete(self, key: str) -> None:
            tried.append(key)
            raise OSError("nor this")

    def refuse(key: str) -> None:
        if key.endswith("optimizer.safetensors"):
            raise RefusedError("no room")

    tried: list[str] = []
    with pytest.raises(RefusedError, match="no room"):
        save(make_saver(tmp_path, Kept(tmp_path / "store", refuse)), make_state(make_model()).stage(1))
    assert len(tried) == 1


def test_a_save_that_fails_after_the_run_did_is_warned_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(key: str) -> None:
        raise RefusedError("no room")

    saver = make_saver(tmp_path, Watched(tmp_path / "store", refuse))
    saver.start(make_state(make_model()).stage(2), {"config.json": b"{}"}, ManifestDraft(config={}))
    saver.close()
    assert "nexa: warning: the last save failed, too: no room\n" in capfd.readouterr().err


def test_a_full_disk_is_told_with_what_the_system_said(tmp_path: Path) -> None:
    (tmp_path / "rundir").write_text("no folder")
    with pytest.raises(NexaError, match=r"saving failed: (NotADirectory|FileExists)Error"):
        save(make_saver(tmp_path, LocalStore(tmp_path / "store")), make_state(make_model()).stage(1))


def test_a_step_that_another_attempt_committed_ends_this_one_as_superseded(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    save(make_saver(tmp_path, store), make_state(make_model()).stage(1))
    other = make_saver(tmp_path, store)
    other.publisher = Publisher(store, RUN, "a1")
    with pytest.raises(SupersededError):
        save(other, make_state(make_model(), steps=3).stage(1))


def test_pieces_that_do_not_make_a_whole_are_refused(tmp_path: Path) -> None:
    import torch

    from nexa_train.backends.base import Piece

    staged = make_state(make_model()).stage(1)
    saver = make_saver(tmp_path, LocalStore(tmp_path / "store"))
    whole = staged.weights["layer.weight"]
    for wrong in (Piece(whole.tensor, 4, (4, 4)), Piece(whole.tensor[:3], 0, (4, 4)), Piece(whole.tensor, 0, (2, 4))):
        staged.weights["layer.weight"] = wrong
        with pytest.raises(NexaError, match=r"layer.weight \[[24], 4\] is not staged exactly once"):
            save(saver, staged)
    staged.weights["layer.weight"] = Piece(torch.zeros(4, 4, dtype=torch.complex64), 0, (4, 4))
    with pytest.raises(NexaError, match=r"layer.weight is torch.complex64, which a checkpoint cannot hold"):
        save(saver, staged)


def test_a_reader_takes_the_rows_and_elements_it_asks_for(tmp_path: Path) -> None:
    import torch

    state, store = make_state(make_model()), LocalStore(tmp_path / "store")
    save(make_saver(tmp_path, store), state.stage(1))
    saved, expected = fetched(store, 1, tmp_path / "fetched"), tensors_of(state)
    embed = expected["embed.weight"]
    assert torch.equal(saved.rows("embed.weight", 1, 3), embed[1:3])
    for start in range(20):
        for count in range(21 - start):
            part = saved.elements("embed.weight", start, count)
            assert torch.equal(part, embed.flatten()[start : start + count])


def test_a_checkpoint_of_another_model_or_optimiser_is_refused_with_what_differs(tmp_path: Path) -> None:
    from torch import nn

    store = LocalStore(tmp_path / "store")
    save(make_saver(tmp_path, store), make_state(make_model()).stage(1))
    saved = fetched(store, 1, tmp_path / "fetched")
    larger = make_model()
    larger.add_module("extra", nn.Linear(2, 2))
    with pytest.raises(ForeignError, match=r"differ in 6 tensors: .*exp_avg.extra.bias") as caught:
        make_state(larger, steps=0).restore(saved)
    assert not caught.value.retryable
    wider = make_model()
    wider.last = nn.Linear(3, 3)  # type: ignore[assignment]
    del wider.last.weight
    with pytest.raises(ForeignError, match=r"last.bias is \(7,\), the job's is \(3,\)"):
        make_state(wider, steps=0).restore(saved)
    with pytest.raises(ForeignError, match=r"differ in \d+ tensors"):
        make_state(make_model(), optimizer="Adafactor", steps=0).restore(saved)


def two_ranks(rank: int, folder: str) -> None:
    """What each of two ranks does; its assertions fail the test."""
    import torch
    import torch.distributed as dist

    from nexa_train.rank import leave

    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    try:
        _read_and_write(path, rank)
        _fail_together(path, rank)
        _stage_replicas(path, rank)
        _stage_one_row(path, rank)
    finally:
        dist.destroy_process_group()
    leave(0)


def sharded_model() -> nn.Module:
    """`make_model`, rows shared out over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(make_model(), mesh=init_device_mesh("cpu", (2,)))


def _read_and_write(path: Path, rank: int) -> None:
    """From one rank to two: every rank its rows, an uneven number and none among them; and out again."""
    state = make_state(sharded_model(), rank=rank, world=2, steps=0)
    state.restore(fetched(LocalStore(path / "one"), 1, path / f"fetched-{rank}"))
    saver = make_saver(path, LocalStore(path / "two"), rank=rank, world=2)
    save(saver, state.stage(1))
    held = {name: piece.tensor.shape for name, piece in state.stage(1).weights.items()}
    assert held["embed.weight"] == ((3, 4), (2, 4))[rank]
    assert held["norm.weight"] == ((1,), (0,))[rank]
    trained = make_state(sharded_model(), rank=rank, world=2)
    save(saver, trained.stage(2))


def _fail_together(path: Path, rank: int) -> None:
    """What one rank's store refuses, or one rank cannot do, every rank raises."""

    def refuse(key: str) -> None:
        if rank == 1 and "safetensors" in key:
            raise RefusedError("rank 1 may not write")

    saver = make_saver(path, Watched(path / "refusing", refuse), rank=rank, world=2)
    staged = make_state(sharded_model(), rank=rank, world=2).stage(1)
    for _ in range(2):  # and the ranks still agree afterwards
        with pytest.raises(RefusedError, match="rank 1 may not write"):
            save(saver, staged)
    if rank == 0:
        store = Watched(path / "taken")
        Publisher(store, RUN, "other").publish(1, {}, ManifestDraft(config={}))
    saver = make_saver(path, LocalStore(path / "taken"), rank=rank, world=2)
    saver.wire.all_gather("the other attempt has committed")
    with pytest.raises(SupersededError, match="committed by another attempt"):
        save(saver, staged)


def _stage_replicas(path: Path, rank: int) -> None:
    """What is whole on both ranks is staged by one of them."""
    state = make_state(make_model(), rank=rank, world=2)
    staged = state.stage(1)
    assert len(staged.weights) == 2
    save(make_saver(path, LocalStore(path / "replicas"), rank=rank, world=2), staged)


def _stage_one_row(path: Path, rank: int) -> None:
    """Of weights of one row, as adapters of rank 1 have, the second rank writes some and holds nothing."""
    import torch

    from nexa_train.backends.base import Piece, Staged

    held = torch.ones(1 - rank, 4)
    weights, moments = ({name: Piece(held, 4 * rank, (1, 4)) for name in names} for names in ("ab", "cd"))
    store = LocalStore(path / "one-row")
    save(make_saver(path, store, rank=rank, world=2), Staged(weights, moments, 1))
    assert_equal(fetched(store, 1, path / f"one-row-{rank}"), dict.fromkeys("abcd", torch.ones(1, 4)))


def test_two_ranks_read_what_one_wrote_and_one_reads_what_two_wrote(tmp_path: Path) -> None:
    import torch.multiprocessing as processes

    one = make_state(make_model())
    digest = save(make_saver(tmp_path, LocalStore(tmp_path / "one")), one.stage(1))
    processes.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    for store, step in (("two", 1), ("two", 2), ("replicas", 1)):
        saved = fetched(LocalStore(tmp_path / store), step, tmp_path / f"{store}-{step}")
        assert_equal(saved, tensors_of(one))
        manifest = read_manifest(LocalStore(tmp_path / store), f"checkpoints/{RUN}/step-{step:08d}").manifest
        assert manifest.weights_digest == digest
        paths = [entry.path for entry in manifest.files]
        assert "model-00002-of-00002.safetensors" in paths
        assert len({entry.object.split("/")[1] for entry in manifest.files}) == 1
    assert LocalStore(tmp_path / "refusing").list() == []
    with pytest.raises(AlreadyExistsError):
        LocalStore(tmp_path / "taken").create(f"checkpoints/{RUN}/step-00000001/manifest.json", b"")


def test_a_store_that_lets_nothing_be_deleted_is_no_reason_to_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Kept(LocalStore):
        """A folder whose objects are locked."""

        def delete(self, key: str) -> None:
            raise RefusedError(f"{key} is locked")

    state, store = make_state(make_model()), Kept(tmp_path / "store")
    saver = make_saver(tmp_path, store, keep_last=1)
    for step in (1, 2, 3):
        save(saver, state.stage(step))

    assert committed_folders(store, RUN)[-1] == f"checkpoints/{RUN}/step-00000003"
    assert "old checkpoints stay until the next save" in capfd.readouterr().err


def test_what_nobody_expected_in_a_steps_folder_is_no_reason_to_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state, store = make_state(make_model()), LocalStore(tmp_path / "store")
    saver = make_saver(tmp_path, store, keep_last=1)
    save(saver, state.stage(1))
    (store.root / "checkpoints" / RUN / "step-00000001" / "manifest.json~").write_bytes(b"an editor's")
    for step in (2, 3):
        save(saver, state.stage(step))

    assert committed_folders(store, RUN) == [f"checkpoints/{RUN}/step-00000003"]
    assert "manifest.json~" in capfd.readouterr().err


@pytest.mark.parametrize("error", [ConfigError("a later major version"), NotFoundError("no bucket")])
def test_a_failed_retention_does_not_fail_what_was_committed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: NexaError
) -> None:
    class Failing(LocalStore):
        def delete(self, key: str) -> None:
            raise error

    state, store = make_state(make_model()), Failing(tmp_path / "store")
    saver = make_saver(tmp_path, store, keep_last=1)
    for step in (1, 2):
        save(saver, state.stage(step))

    assert committed_folders(store, RUN) == [f"checkpoints/{RUN}/step-00000002"]
    assert f"old checkpoints stay until the next save: {error}" in capfd.readouterr().err
