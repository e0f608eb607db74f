"""Reference strategies: what each gives, that all give the same, and that a cache is exact or refused."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows
from safetensors.torch import load_file, save_file
from tiny_training import tiny_config, tiny_trainer

import tdpo
from tdpo import TDPOConfig, TDPOTrainer, UserError
from tdpo.data.dataset import prepare_pairs
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.data.tokenise import Lengths, Tokeniser
from tdpo.models.fingerprint import config_hash, weights_hash
from tdpo.models.reference import AdapterOff, FrozenCopy, reference_hidden
from tdpo.models.store import CachedHidden, CacheKey, HiddenStore
from tdpo.score import score_batch
from tdpo.train.reference_cache import FillOptions, cache_key, fill
from tdpo.types import Head, PackedBatch, TokenisedPair

OBJECTIVE = tdpo.objectives.tdpo1(0.3)
CPU = torch.device("cpu")


def how(dtype: str = "auto", batch_size: int = 4) -> FillOptions:
    return FillOptions(CPU, batch_size, dtype, "no", nullcontext)


def config(folder: Path, **fields: Any) -> TDPOConfig:
    """Two epochs, so that a cached reference is read again."""
    return tiny_config(folder, **{"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 2, **fields})


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[TokenisedPair]:
    """Ten different pairs."""
    prepared = prepare_pairs(preference_rows(10), Tokeniser(tokenizer, Lengths(96, 48)))
    assert len({pair.key for pair in prepared}) == 10
    return list(prepared)


def filled(folder: Path, model: Any, pairs: list[TokenisedPair], pack: Any = pack_trees, **options: Any) -> HiddenStore:
    reference = FrozenCopy.of(model)
    store = HiddenStore(folder, cache_key(reference, pack, how(**options)))
    fill(store, reference, pairs, pack, how(**options))
    return store


class InDtype:
    """A live reference whose hidden states are rounded to a dtype."""

    def __init__(self, reference: FrozenCopy, dtype: torch.dtype) -> None:
        self.reference, self.dtype = reference, dtype

    def states(self, batch: PackedBatch) -> torch.Tensor:
        live = self.reference.states(batch)
        return live.to(self.dtype).to(live.dtype)

    def head(self) -> Head:
        return self.reference.head()


@pytest.mark.parametrize("pack", [pack_padded, pack_trees])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_cached_statistics_are_bit_equal_to_the_live_reference_in_the_caches_dtype(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenisedPair], dtype: str, pack: Any
) -> None:
    """On the batches the cache was filled in; elsewhere a matrix product of another size may round otherwise."""
    policy, model = make_model(len(tokenizer), seed=1), make_model(len(tokenizer))
    store = filled(tmp_path, model, pairs, pack, dtype=dtype)
    live = FrozenCopy(model)
    cached, kept = CachedHidden(store, live.head()), store.key.torch_dtype
    assert kept == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    assert store.bytes_per_token() == 32 * kept.itemsize
    ordered = sorted(pairs, key=lambda pair: -len(pair.prompt_ids) - len(pair.chosen_ids + pair.rejected_ids))
    for start in range(0, len(pairs), 4):
        batch = pack(ordered[start : start + 4])
        ours = score_batch(policy, cached, batch, OBJECTIVE)
        theirs = score_batch(policy, InDtype(live, kept), batch, OBJECTIVE)
        for name in ("logp", "ref_logp", "kl"):
            assert torch.equal(getattr(ours.tokens, name), getattr(theirs.tokens, name)), name
    shuffled = pack([pairs[7], pairs[0], pairs[3]])
    ours, theirs = (score_batch(policy, r, shuffled, OBJECTIVE) for r in (cached, InDtype(live, kept)))
    torch.testing.assert_close(ours.tokens.kl, theirs.tokens.kl, rtol=1e-4 if kept == torch.float32 else 3e-2, atol=0)


def test_later_epochs_never_run_the_references_body(tmp_path: Path, tokenizer: Any) -> None:
    """Filling runs it once for ten pairs in batches of four; training and evaluation not at all."""
    other = make_model(len(tokenizer), seed=1)
    runs: list[int] = []
    other.model.register_forward_hook(lambda *_: runs.append(1))
    args = config(tmp_path / "a", per_device_eval_batch_size=4, reference_cache=str(tmp_path / "cache"))
    rows = preference_rows(10)
    first = TDPOTrainer(make_model(len(tokenizer)), other, args, None, rows, rows[:3], tokenizer)
    before = len(runs)
    first.train()
    first.evaluate()
    assert len(runs) == before
    assert isinstance(first.reference, CachedHidden) and first.reference.models() == []
    runs.clear()
    again = copy.copy(args)
    TDPOTrainer(make_model(len(tokenizer)), other, again, None, rows, rows[:3], tokenizer).train()
    probes = len(runs)
    assert probes <= 2  # its head and its dtype are looked at; what was cached is not computed again
    # A second copy of a frozen reference counts as often as there are batches.
    runs.clear()
    TDPOTrainer(make_model(len(tokenizer)), other, config(tmp_path / "b"), None, rows, None, tokenizer).train()
    assert len(runs) == 2 * 3


def test_the_body_of_a_cached_reference_is_let_go(tmp_path: Path, tokenizer: Any) -> None:
    body = weakref.ref((other := make_model(len(tokenizer), seed=1)).model)
    args = config(tmp_path / "a", reference="cached")
    trainer = TDPOTrainer(make_model(len(tokenizer)), other, args, None, preference_rows(4), None, tokenizer)
    del other
    gc.collect()
    assert body() is None
    assert trainer.evaluate(preference_rows(4))["eval_kl/chosen"] > 0.1
    assert (tmp_path / "a" / "_reference-cache" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "adapter", [None, {}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"use_rslora": True}]
)
def test_every_strategy_gives_the_trajectory_of_a_frozen_copy(
    tmp_path: Path, tokenizer: Any, adapter: dict[str, Any] | None
) -> None:
    histories, gradients = {}, {}
    for strategy in ("frozen", "cached", *(() if adapter is None else ("adapter_off",))):
        torch.manual_seed(3)
        trainer = TDPOTrainer(
            make_model(len(tokenizer)), None, config(tmp_path / strategy, reference=strategy), None, preference_rows(),
            None, tokenizer, peft_config=None if adapter is None else lora(**adapter),
        )  # fmt: skip
        assert trainer.reference_line.startswith(f"reference: {strategy} (")
        trainer.train()
        histories[strategy] = trainer.state.log_history[:-1]
        gradients[strategy] = histories[strategy][0]["grad_norm"]
    assert len(histories["frozen"]) == 12
    for strategy, history in histories.items():
        assert gradients[strategy] == pytest.approx(gradients["frozen"], rel=1e-5)
        for ours, theirs in zip(history, histories["frozen"], strict=True):
            for name in ("loss", "grad_norm", "kl/chosen", "kl/rejected", "rewards/margins"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (strategy, name)


def test_auto_takes_what_fits_and_says_why(tmp_path: Path, tokenizer: Any) -> None:
    from peft import get_peft_model

    def line(policy: Any = None, reference: Any = None, peft_config: Any = None, **options: Any) -> str:
        model = policy or make_model(len(tokenizer))
        args = config(tmp_path, **options)
        rows = preference_rows(4)
        return TDPOTrainer(model, reference, args, None, rows, None, tokenizer, peft_config=peft_config).reference_line

    assert line() == "reference: frozen (the policy as it is before training)"
    assert line(reference=make_model(len(tokenizer), 1)) == "reference: frozen (the model named as reference)"
    assert line(peft_config=lora()).startswith("reference: adapter_off (the adapter is new, so the policy without it")
    changes = "reference: frozen (a copy from before the adapter, whose configuration changes or trains the base)"
    assert line(peft_config=lora(init_lora_weights="pissa")) == changes
    assert line(peft_config=lora(bias="all")) == changes
    continued = get_peft_model(make_model(len(tokenizer)), lora(init_lora_weights=False))
    assert "adapter as loaded; --reference adapter_off takes its base" in line(continued)
    assert line(continued, reference=None).startswith("reference: frozen")
    cached = line(reference_cache=str(tmp_path / "cache"))
    assert cached.startswith("reference: cached (--reference_cache names a folder; hidden states of the policy")
    assert cached.endswith(f"4 different pairs in {tmp_path / 'cache'}, 128 bytes a token")


def test_strategies_that_cannot_be_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    def off(adapter: Any = None, reference: Any = None) -> None:
        model = make_model(len(tokenizer))
        biased = copy.deepcopy(model.config)
        biased.attention_bias = True
        policy = type(model)(biased) if getattr(adapter, "bias", "none") != "none" else model
        args = config(tmp_path, reference="adapter_off")
        TDPOTrainer(policy, reference, args, None, preference_rows(4), None, tokenizer, peft_config=adapter)

    with pytest.raises(UserError, match="--reference adapter_off needs an adapter: --use_peft"):
        off()
    with pytest.raises(UserError, match="a reference model beside it"):
        off(lora(), make_model(len(tokenizer)))
    with pytest.raises(UserError, match=r"q_proj.bias of the base is trained too"):
        off(lora(bias="all"))
    with pytest.raises(UserError, match="init_lora_weights='olora' changes the weights of the base"):
        off(lora(init_lora_weights="olora"))
    with pytest.raises(UserError, match="--reference frozen and --reference_cache contradict"):
        config(tmp_path, reference="frozen", reference_cache="x")
    with pytest.raises(UserError, match="--reference_cache and --output_dir are one folder"):
        config(tmp_path, reference_cache=str(tmp_path / "x" / ".."))
    with pytest.raises(UserError, match="--reference_cache_dtype has no effect"):
        config(tmp_path, reference_cache_dtype="bfloat16")
    with pytest.raises(UserError, match="--reference live: there are auto, frozen, adapter_off, cached"):
        config(tmp_path, reference="live")


def test_adapter_off_is_the_base_bit_for_bit_and_leaves_no_trace(tokenizer: Any, pairs: list[TokenisedPair]) -> None:
    """Also with dropout on, a head that is trained, and a part of the adapter frozen on purpose."""
    from peft import get_peft_model

    base = make_model(len(tokenizer))
    options = {"init_lora_weights": False, "lora_dropout": 0.5, "modules_to_save": ["lm_head"]}
    policy = get_peft_model(copy.deepcopy(base), lora(**options)).train()
    with torch.no_grad():
        policy.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.3)
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n).requires_grad_(False)
    before = [(n, p.requires_grad) for n, p in policy.named_parameters()], [m.training for m in policy.modules()]
    batch = pack_trees(pairs)
    ours, theirs = (reference_hidden(reference, batch) for reference in (AdapterOff(policy), FrozenCopy(base)))
    assert torch.equal(ours.states, theirs.states) and torch.equal(ours.head.weight, theirs.head.weight)
    assert (
        [(n, p.requires_grad) for n, p in policy.named_parameters()],
        [m.training for m in policy.modules()],
    ) == before
    assert not frozen.requires_grad and not ours.states.requires_grad
    on = policy.eval()(input_ids=batch.input_ids[:1, :4]).logits
    assert not torch.allclose(on, base(input_ids=batch.input_ids[:1, :4]).logits, atol=1e-3)


def test_an_adapter_does_not_change_its_bases_hash_and_anything_else_does(tokenizer: Any) -> None:
    from peft import get_peft_model

    base = make_model(len(tokenizer))
    expected, settings = weights_hash(base), config_hash(base)
    assert expected == weights_hash(copy.deepcopy(base)) != weights_hash(make_model(len(tokenizer), seed=1))
    adapted = get_peft_model(
        copy.deepcopy(base), lora(init_lora_weights=False, modules_to_save=["lm_head"], use_dora=True)
    )
    assert weights_hash(adapted, with_adapter=False) == expected != weights_hash(adapted)
    assert config_hash(adapted, with_adapter=False) == settings != config_hash(adapted)
    with torch.no_grad():
        base.model.norm.weight[3] += 1e-6
    assert weights_hash(base) != expected
    base.config.rms_norm_eps = 1e-4
    assert config_hash(base) != settings
    base.config.rms_norm_eps, base.config.pad_token_id = copy.deepcopy(make_model(9).config.rms_norm_eps), 7
    assert config_hash(base) == settings, "what no hidden state depends on is left out"


def test_a_cache_of_anything_else_is_refused_in_words(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenisedPair]
) -> None:
    model = make_model(len(tokenizer))
    store = filled(tmp_path, model, pairs)
    with pytest.raises(UserError, match=r"is stale: it was filled with layout tree \(now padded\)"):
        filled(tmp_path, model, pairs, pack_padded)
    with pytest.raises(UserError, match=r"is stale: it was filled with dtype float32 \(now bfloat16\)"):
        filled(tmp_path, model, pairs, dtype="bfloat16")
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-4
    with pytest.raises(UserError, match="is stale: it was filled with other weights"):
        filled(tmp_path, moved, pairs)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"filled with attention sdpa \(now eager\)"):
        filled(tmp_path, eager, pairs)
    reshaped = copy.deepcopy(model)
    reshaped.config.rope_parameters = {**reshaped.config.rope_parameters, "rope_theta": 5000.0}
    with pytest.raises(UserError, match="another config of the reference"):
        filled(tmp_path, reshaped, pairs)
    changed = TokenisedPair(pairs[0].prompt_ids, pairs[0].chosen_ids, [*pairs[0].rejected_ids[:-1], 9], row=41)
    batch = pack_trees([pairs[1], changed])
    with pytest.raises(UserError, match=r"lacks 1 of 2 pairs \(rows 41\): tokens changed since"):
        store.states(batch.pair_keys, batch.lengths, batch.pair_rows)


def test_training_on_other_tokens_is_refused_before_the_first_step(tmp_path: Path, tokenizer: Any) -> None:
    args = config(tmp_path, reference_cache=str(tmp_path / "cache"))
    rows = preference_rows(10)
    TDPOTrainer(make_model(len(tokenizer)), None, args, None, rows, None, tokenizer)
    TDPOTrainer(make_model(len(tokenizer)), None, args, None, rows[3:7][::-1], None, tokenizer)  # a subset, turned
    rows[6]["rejected"] += "!"
    with pytest.raises(UserError, match=r"it lacks 1 of 10 pairs \(rows 7\)"):
        TDPOTrainer(make_model(len(tokenizer)), None, args, None, rows, None, tokenizer)
    trainer = TDPOTrainer(make_model(len(tokenizer)), None, args, None, rows[:3], None, tokenizer)
    with pytest.raises(UserError, match=r"it lacks 1 of 2 pairs \(rows 2\)"):
        trainer.evaluate(rows[5:7])


def test_filling_goes_on_where_it_was_interrupted(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenisedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdpo.train import reference_cache

    monkeypatch.setattr(reference_cache, "SHARD_BYTES", 1)  # a shard a batch
    model = make_model(len(tokenizer))
    written = HiddenStore.add
    shards = []

    def dies_at_the_third(self: HiddenStore, *args: Any) -> None:
        if len(shards) == 2:
            (self.folder / "hidden-0.safetensors.partial-1").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        shards.append(written(self, *args))

    monkeypatch.setattr(HiddenStore, "add", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, model, pairs, batch_size=2)
    monkeypatch.setattr(HiddenStore, "add", written)
    reference = FrozenCopy(model)
    store = HiddenStore(tmp_path, cache_key(reference, pack_trees, how()))
    assert len(store) == 4 and len(store.missing(pairs)) == 6
    assert fill(store, reference, pairs, pack_trees, how(batch_size=2)) == 6
    assert len(store) == 10 and not list(tmp_path.glob("*.partial-*"))
    assert len(list(tmp_path.glob("hidden-*.safetensors"))) == 5


def test_a_shard_that_changed_on_disk_is_noticed(tmp_path: Path, tokenizer: Any, pairs: list[TokenisedPair]) -> None:
    model = make_model(len(tokenizer))
    store = filled(tmp_path, model, pairs)
    (shard,) = tmp_path.glob("hidden-*.safetensors")
    whole = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(whole[:-3] + b"\0\0\7")
    with pytest.raises(UserError, match=r"hidden-.*its content changed since it was written"):
        filled(tmp_path, model, pairs)
    shard.write_bytes(whole[:-50])
    with pytest.raises(UserError, match=r"hidden-.*cannot be read"):
        HiddenStore(tmp_path, store.key)
    shard.write_bytes(whole)
    tensors = load_file(shard)
    save_file(tensors, shard, metadata={"key": "of another"})
    with pytest.raises(UserError, match="belongs to another reference cache"):
        HiddenStore(tmp_path, store.key)
    (tmp_path / "manifest.json").write_text(json.dumps({"key": 3}))
    with pytest.raises(UserError, match="cannot be read as the manifest"):
        HiddenStore(tmp_path, store.key)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="shards without manifest"):
        HiddenStore(tmp_path, store.key)


def test_a_dtype_that_cannot_hold_the_states_is_refused(tmp_path: Path) -> None:
    key = CacheKey("w", "c", "float16", "no", "sdpa", "tree", "l")
    pair = TokenisedPair([1], [2], [3])
    with pytest.raises(UserError, match=r"not finite in float16; --reference_cache_dtype bfloat16"):
        HiddenStore(tmp_path, key).add([pair], torch.full((2, 4), 1e5).half())


def test_a_collator_that_does_not_name_its_pairs_is_refused(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenisedPair]
) -> None:
    store = filled(tmp_path, make_model(len(tokenizer)), pairs)
    with pytest.raises(UserError, match="the batch does not say its pairs"):
        store.states((), pack_trees(pairs).lengths)


def test_mixed_precision_is_part_of_the_key(tmp_path: Path, tokenizer: Any) -> None:
    cache = str(tmp_path / "cache")
    rows = preference_rows(8)
    losses = {}
    for name, options in {"cached": {"reference_cache": cache}, "frozen": {}}.items():
        args = config(tmp_path / name, bf16=True, max_steps=2, **options)
        trainer = TDPOTrainer(
            make_model(len(tokenizer)), make_model(len(tokenizer), 1), args, None, rows, None, tokenizer
        )
        trainer.train()
        losses[name] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses["cached"] == pytest.approx(losses["frozen"], rel=2e-3)
    with pytest.raises(UserError, match=r"filled with precision bf16 \(now no\)"):
        args = config(tmp_path, reference_cache=cache)
        TDPOTrainer(make_model(len(tokenizer)), make_model(len(tokenizer), 1), args, None, rows, None, tokenizer)


def following(folder: Path, tokenizer: Any, ref_model: Any = None, **fields: Any) -> TDPOTrainer:
    fields = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "per_device_train_batch_size": 4, **fields}
    return tiny_trainer(folder, tokenizer, ref_model=ref_model, sync_ref_model=True, ref_model_sync_steps=2, **fields)


def test_a_reference_that_follows_moves_its_share_every_so_many_steps(tmp_path: Path, tokenizer: Any) -> None:
    made = following(tmp_path, tokenizer, ref_model_mixup_alpha=0.25, max_steps=3, save_steps=1)
    assert made.reference_line.endswith("; every 2 steps it takes 0.25 of the policy")
    made.train()
    start = dict(make_model(len(tokenizer)).named_parameters())
    second = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, parameter in made.reference.model.named_parameters():
        torch.testing.assert_close(parameter.data, torch.lerp(start[name].data, second[name], 0.25))
    assert not torch.equal(second["model.norm.weight"], start["model.norm.weight"])


def test_a_reference_that_takes_the_policys_weights_leaves_no_divergence(tmp_path: Path, tokenizer: Any) -> None:
    made = following(tmp_path, tokenizer, ref_model_mixup_alpha=1.0)
    made.train()
    kl = [log["kl/chosen"] for log in made.state.log_history if "kl/chosen" in log]
    assert [abs(value) < 1e-6 for value in kl] == [True, False, True, False, True, False]


def test_a_run_whose_reference_follows_resumes_bit_for_bit(tmp_path: Path, tokenizer: Any) -> None:
    """From between two moves, and with a reference that is not where it began."""
    ends = []
    for name, resume in (("whole", False), ("parts", True)):
        made = following(tmp_path / name, tokenizer)
        if resume:
            shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / name / "checkpoint-3")
        made.train(resume_from_checkpoint=resume)
        made.save_model()
        ends.append(
            [load_file(tmp_path / name / file) for file in ("model.safetensors", "checkpoint-6/reference.safetensors")]
        )
    for whole, parts in zip(*ends, strict=True):
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    (tmp_path / "parts" / "checkpoint-6" / "reference.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no reference\.safetensors: it was written without --sync_ref_model"):
        following(tmp_path / "parts", tokenizer, max_steps=8).train(str(tmp_path / "parts" / "checkpoint-6"))


def test_what_cannot_follow_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    from peft import get_peft_model

    with pytest.raises(UserError, match="--ref_model_sync_steps has no effect without --sync_ref_model"):
        config(tmp_path, ref_model_sync_steps=4)
    with pytest.raises(UserError, match="--sync_ref_model moves the reference, and --reference cached"):
        config(tmp_path, sync_ref_model=True, reference="cached")
    with pytest.raises(UserError, match=r"--ref_model_mixup_alpha must be in \(0, 1\], got 1.5"):
        config(tmp_path, sync_ref_model=True, ref_model_mixup_alpha=1.5)
    args = config(tmp_path, sync_ref_model=True)
    adapted = get_peft_model(make_model(len(tokenizer)), lora())
    deeper = make_model(len(tokenizer))
    deeper.model.layers.append(copy.deepcopy(deeper.model.layers[0]))
    for policy, reference in ((adapted, None), (make_model(len(tokenizer)), deeper)):
        with pytest.raises(UserError, match="can only follow a policy that is a whole model of the same shape"):
            TDPOTrainer(policy, reference, args, None, preference_rows(), None, tokenizer)
