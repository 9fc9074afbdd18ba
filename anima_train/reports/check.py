"""The report of `anima check`, as lines for the terminal and as values for the page."""

from collections.abc import Sequence

from anima_train.adapters.full import Full
from anima_train.caching.sizes import total_bytes
from anima_train.caching.text_encoding import encodes_online
from anima_train.config.load import LoadedConfig
from anima_train.core.format import count, format_bytes, printable
from anima_train.data.scan import Scan
from anima_train.model.dit import TransformerShape
from anima_train.model.llm_adapter import LLMAdapterShape
from anima_train.model.loading import ModelSpec
from anima_train.model.text import load_tokenizers
from anima_train.optim.groups import group_rows
from anima_train.reports.dataset import DatasetReport, SetReport, collect
from anima_train.training.build import plan_run, trainable_transformer
from anima_train.training.costs import Measured, ModelStats


def dataset_report(
    title: str, loaded: LoadedConfig, spec: ModelSpec, scans: dict[str, Scan], max_thumbnails: int,
    measured: Sequence[Measured] = (),
) -> DatasetReport:  # fmt: skip
    """Return the report for the page, with at most `max_thumbnails` pictures.

    Measured costs replace the estimates of their buckets.

    Raises:
        ModelFileError: a tokenizer cannot be loaded.
    """
    config, files = loaded.config, spec.files
    plan, schedule = plan_run(config, scans["train"].samples, num_processes=1)
    transformer = trainable_transformer(spec, config.adapter, config.learning_rates(), config.seed)
    groups = group_rows(transformer, config.learning_rates())
    num_trained = sum(row.num_parameters for row in groups)
    num_all = sum(parameter.numel() for parameter in transformer.parameters())
    adapter = LLMAdapterShape.of(files.llm_adapter_header.entries)
    is_online = encodes_online(config.model.cache_text_embeddings, plan.samples)
    has_text_encoder = is_online and config.model.text_encoder_device == "training"
    model = ModelStats(
        TransformerShape.of(files.transformer_header.entries),
        num_weights=num_all if isinstance(config.adapter, Full) else num_all - num_trained,
        num_trained=num_trained,
        source_width=adapter.source_width,
        context_width=adapter.target_width,
        num_text_weights=files.num_text_weights(config.learning_rates().by_component["llm_adapter"])
        if has_text_encoder
        else 0,
    )
    return collect(
        title, config, loaded.notes, scans, plan, schedule, groups,
        load_tokenizers(files.tokenizer, files.t5_tokenizer), model, max_thumbnails, measured,
    )  # fmt: skip


def summary(found: DatasetReport) -> list[str]:
    """Return the findings of the page that `describe_run` lacks, in a few lines."""
    lines = []
    for item in found.sets:
        facts = item.captions
        lines.append(
            f"captions of {item.name}: {len(facts.lengths):,} different, {len(facts.truncated):,} cut off, "
            f"{len(facts.unknown):,} characters T5 cannot read, {len(facts.typos):,} tags that look mistyped"
        )
        lines.extend(missing_text(item))
    kinds = ", ".join(f"{cost.number:,} {cost.kind}" for cost in found.cache if cost.number)
    lines.append(f"cache: {kinds}, {format_bytes(total_bytes(found.cache))} in all")
    lines.extend(costs_text(found))
    return lines


def missing_text(found: SetReport) -> list[str]:
    """Return a line about trigger words, if images lack one."""
    lacking = [
        f"{count(len(item.images), 'image')} of directory[{item.directory}] without {item.described}"
        for item in found.missing
    ]
    return [printable(f"trigger words of {found.name}: {'; '.join(lacking)}")] if lacking else []


def costs_text(found: DatasetReport) -> list[str]:
    """Return lines with memory and time of the training set's buckets: measured, or the estimate for the largest."""
    buckets = found.sets[0].buckets
    lines = []
    for bucket in buckets:
        if (measured := bucket.measured) is None:
            continue
        title = f"measured {bucket.size}, batch {bucket.batch_size:,}:"
        if measured.seconds_per_step is None:
            lines.append(f"{title} {measured.described}; what to change, in order of cost: {'; '.join(bucket.savings)}")
        else:
            lines.append(f"{title} {measured.described} a step, {format_bytes(measured.peak_bytes)} of memory at most")
    if not lines:
        memory = max(bucket.memory.total for bucket in buckets if bucket.memory is not None)
        lines.append(f"memory: about {format_bytes(memory)} on the device for the largest bucket (an estimate)")
    if found.run_seconds is not None:
        lines.append(f"the whole run: {found.run_time}")
    return lines
