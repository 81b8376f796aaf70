"""Settings that contradict each other."""

from __future__ import annotations

from gpt_dist.config.settings import Config, KindConfig, ModelConfig, show


def architecture_problems(model: ModelConfig) -> list[str]:
    """Settings of a model that its architecture does not have, one line each."""
    parts, name = model.parts, f"model.architecture = {model.architecture}"
    problems = [
        f"model.{key} = {show(getattr(model, key))}: {name} has {show(parts.defaults[key])}; "
        f"leave model.{key} out"
        for key in parts.fixed
        if (getattr(model, key) or None) != (parts.defaults[key] or None)
    ]
    if model.kv_heads != model.n_head and not parts.shares_keys:
        problems.append(f"model.n_kv_head = {model.n_kv_head}: {name} has n_head of them")
    if model.n_head % model.kv_heads:
        problems.append(
            f"model.n_kv_head = {model.kv_heads}: must divide model.n_head = {model.n_head}"
        )
    if parts.positions == "rotary" and model.n_embd % (2 * model.n_head):
        problems.append(
            f"model.n_head = {model.n_head}: {name} rotates pairs of channels, so "
            f"2 * model.n_head must divide model.n_embd = {model.n_embd}"
        )
    if not model.n_layer and not parts.bigram:
        problems.append(f"model.n_layer = 0: {name} needs a layer; the bigram baseline is a gpt2")
    if model.zero_head and model.tie_embeddings:
        problems.append("model.zero_head = true: needs model.tie_embeddings = false")
    return problems


def shape_problems(config: Config, world_size: int = 1) -> list[str]:
    """Conflicts between the model's shape and other settings, one line each."""
    model, batch = config.model, config.train.batch_tokens
    problems = architecture_problems(model)
    if model.n_embd % model.n_head:
        problems.append(f"model.n_head = {model.n_head}: must divide model.n_embd = {model.n_embd}")
    if model.n_layer == 0 and model.norm == "post":
        problems.append("model.norm = post: needs at least one layer, but model.n_layer = 0")
    quantum = model.context_length * world_size
    if batch % quantum:
        near = max(1, round(batch / quantum)) * quantum
        problems.append(
            f"train.batch_tokens = {batch}: must be a multiple of "
            f"model.context_length * ranks = {model.context_length} * {world_size} = {quantum}, "
            f"for example {near}"
        )
    return problems


def combination_problems(config: Config, world_size: int = 1) -> list[str]:
    """Conflicts between settings that are each valid alone, one line each.

    Where ``train.init_from`` is yet to fill in the model's shape, that is left out.
    """
    problems = [] if config.unset_shape else shape_problems(config, world_size)
    train, optim = config.train, config.optim
    if optim.schedule != "constant" and optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr = {optim.min_lr:g}: must be at most optim.lr = {optim.lr:g}")
    if config.optim.rates.head != KindConfig() and config.model.tie_embeddings:
        problems.append(
            "optim.rates.head: needs model.tie_embeddings = false; a tied head is the embedding"
        )
    if optim.rates.vectors != KindConfig() and not config.model.has_vectors:
        problems.append(
            f"optim.rates.vectors: model.architecture = {config.model.architecture} has no biases "
            "or norms with weights; leave it out"
        )
    if optim.name == "muon" and (optim.rates.matrices.beta1, optim.rates.matrices.beta2) != (
        None,
        None,
    ):
        problems.append(
            "optim.rates.matrices.beta1, beta2: need optim.name = adamw; Muon has optim.momentum"
        )
    if train.steps is None and train.epochs is None:
        problems.append("train.steps = null: set train.steps or train.epochs")
    if train.epochs is None and train.steps is not None and optim.warmup_steps > train.steps:
        problems.append(
            f"optim.warmup_steps = {optim.warmup_steps}: "
            f"must be at most train.steps = {train.steps}"
        )
    parallel = config.parallel
    if train.compile is True and parallel.shards_weights:
        problems.append(
            "train.compile = true: not with parallel.zero_stage = 3, which gathers the weights "
            "between the operations that would be fused; set it to false or use stage 0 to 2"
        )
    if parallel.strategy != "deepspeed":
        for key in ("offload", "deepspeed_config"):
            if getattr(parallel, key):
                problems.append(f"parallel.{key}: needs parallel.strategy = deepspeed")
    elif parallel.offload and parallel.zero_stage < 2:
        problems.append(
            f"parallel.offload = true: needs parallel.zero_stage 2 or 3, not {parallel.zero_stage}"
        )
    return problems
