"""From a model and settings to an ``EngineCore``: how much memory there is, and what it is used for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import torch

from hrwkv.engine.core import EngineCore
from hrwkv.engine.memory import Memory, MemorySizes
from hrwkv.engine.prefixes import Prefixes
from hrwkv.engine.runner import Runner
from hrwkv.engine.scheduler import Scheduler
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.cache import STAGING_BYTES, HostPages, HybridCache
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import EngineSettings

logger = logging.getLogger(__name__)
CPU_CACHE_BYTES = 2**30
# Of the host's free memory, what kept prefixes may take, and how much at most beside a GPU.
PREFIX_SHARE, GPU_PREFIX_BYTES = 0.25, 2**33
# Copies of a step's logits that sampling may hold at a time.
LOGITS_COPIES = 4


def fit_memory(model: HybridModel, settings: EngineSettings) -> MemorySizes:
    """What the memory that the settings leave can hold. Raises ValueError if that is no sequence."""
    return MemorySizes.fit(
        model.config,
        settings,
        budget=_budget(model, settings),
        max_context=settings.max_context or model.config.max_position_embeddings,
        kv_itemsize=model.lm_head.weight.dtype.itemsize,
        state_itemsize=getattr(torch, settings.state_dtype).itemsize,
    )


def build_core(
    model: HybridModel,
    settings: EngineSettings,
    *,
    sizes: MemorySizes,
    clock: Callable[[], float] = time.monotonic,
) -> EngineCore:
    """A core with memory of these sizes.

    Raises ValueError for a state_dtype that needs a GPU, and for more host memory than can be locked.
    """
    weight = model.lm_head.weight
    if settings.state_dtype != "float32" and not weight.is_cuda:
        raise ValueError(f"state_dtype is {settings.state_dtype}, expected float32 without a GPU")
    cache = HybridCache.allocate(
        model.config,
        slots=sizes.slots,
        blocks=sizes.blocks,
        block_size=sizes.block_size,
        device=weight.device,
        dtype=weight.dtype,
        state_dtype=getattr(torch, settings.state_dtype),
    )
    context = longest_context(model, settings, sizes=sizes)
    logger.info("cache: %s", describe(sizes, context=context))
    trained = model.config.max_position_embeddings
    if context > trained:
        logger.warning("contexts of up to %d tokens; the model's config says %d", context, trained)
    memory = Memory(sizes, swap_bytes=settings.swap_bytes, prefix_bytes=prefix_bytes(model, settings))
    runner = Runner(model, cache, _host_pages(cache, memory), sizes=sizes, max_context=context)
    if settings.cuda_graphs != "off" and weight.is_cuda:
        runner.use_graphs(now=settings.cuda_graphs == "startup")
    scheduler = Scheduler(memory, Prefixes(memory), step_tokens=settings.step_tokens)
    overlap = weight.is_cuda if settings.overlap == "auto" else settings.overlap == "on"
    return EngineCore(runner, scheduler, overlap=overlap, clock=clock)


def describe(sizes: MemorySizes, *, context: int) -> str:
    """What fits, in one line."""
    states, keys = sizes.slots * sizes.slot_bytes / 2**20, sizes.blocks * sizes.block_bytes / 2**20
    tokens = "any number of" if sizes.kv_tokens is None else f"{sizes.kv_tokens:,}"
    return (
        f"{sizes.slots} sequences at once (states: {states:,.0f} MiB), {tokens} tokens in all "
        f"(keys and values: {keys:,.0f} MiB), at most {context:,} a sequence"
    )


def longest_context(model: HybridModel, settings: EngineSettings, *, sizes: MemorySizes) -> int:
    """Tokens that prompt and answer may have together."""
    context = settings.max_context or model.config.max_position_embeddings
    # The last token of an answer is never read, so it takes no room.
    return context if sizes.kv_tokens is None else min(context, sizes.kv_tokens + 1)


def prefix_bytes(model: HybridModel, settings: EngineSettings) -> int:
    """Bytes of host memory for kept prefixes."""
    if settings.prefix_cache_bytes is not None:
        return settings.prefix_cache_bytes
    most = GPU_PREFIX_BYTES if model.lm_head.weight.is_cuda else CPU_CACHE_BYTES
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # no Linux
        return CPU_CACHE_BYTES
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(free * PREFIX_SHARE), most)


def _host_pages(cache: HybridCache, memory: Memory) -> HostPages:
    begun, page_bytes = time.monotonic(), memory.sizes.page_bytes
    try:
        pages = HostPages(cache, memory.num_pages, page_bytes=page_bytes, num_ready=memory.kept.total)
    except RuntimeError as error:
        raise ValueError(
            f"the host cannot give {memory.kept.total * page_bytes} bytes for kept prefixes "
            f"({str(error).splitlines()[0]}): lower prefix_cache_bytes"
        ) from error
    kept, seconds = memory.kept.total * page_bytes / 2**30, time.monotonic() - begun
    logger.info("host memory: %.1f GiB for kept prefixes (%.1f s to get it)", kept, seconds)
    return pages


def _budget(model: HybridModel, settings: EngineSettings) -> int:
    """Bytes for states, keys and values."""
    device = model.lm_head.weight.device
    if settings.cache_bytes is not None:
        return settings.cache_bytes
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    working = _working_bytes(model, settings)
    free, total = torch.cuda.mem_get_info(device)
    budget = int(total * settings.memory_fraction) - (total - free) - working
    if budget <= 0:
        raise ValueError(
            f"memory_fraction {settings.memory_fraction} of {total} bytes leaves no room for a cache: "
            f"{total - free} are in use and a step needs {working}: raise it or lower step_tokens"
        )
    return budget


@torch.inference_mode()
def _working_bytes(model: HybridModel, settings: EngineSettings) -> int:
    """Bytes beyond weights and cache: the largest step's, measured without a cache, and those for copies."""
    device = model.lm_head.weight.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    tokens = torch.zeros(settings.step_tokens, dtype=torch.int64, device=device)
    hidden = model(tokens, TokenBatch.from_lengths([len(tokens)], device=device))
    logits = model.compute_logits(hidden[: settings.max_sequences]).float()
    peak = torch.cuda.max_memory_allocated(device) - before
    working = peak + (LOGITS_COPIES - 1) * logits.nbytes + STAGING_BYTES
    del hidden, logits
    torch.cuda.empty_cache()
    return working
