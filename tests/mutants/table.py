"""Which tests speak for which file, and the mutants that no test could tell from the source."""


def _of(file: str, *names: str) -> tuple[str, ...]:
    """Some tests of a file: those that need no process of their own, and little time."""
    return tuple(f"tests/{file}::test_{name}" for name in names)


_COST = ("tests/core/test_cost.py", "tests/core/test_cost_of_pruning.py")
_FAMILIES = ("tests/core/test_family_table.py", "tests/core/test_cost.py")
_BUDGETS = _of(
    "evaluate/test_evaluate.py",
    "every_method_reaches_a_budget",
    "budgets_stay_what_they_were",
    "budgets_move_layers_only_where_they_must",
    "what_no_budget_can_be_is_refused",
    "himap_takes_the_tasks_preset_and_fields_over_it",
)
_METHOD = ("tests/pruners/test_pruners.py", "tests/core/test_cost_of_pruning.py", *_BUDGETS)
_RUN = _of(
    "evaluate/test_evaluate.py",
    "a_row_says_what_was_asked_answered_and_paid",
    "a_batch_that_fails_as_a_whole_is_asked_one_by_one",
    "a_broken_image_fails_alone_and_is_asked_again_later",
    "when_all_fail_something_else_is_wrong",
    "a_cut_row_is_written_again",
    "a_finished_run_asks_nothing",
    "another_run_in_the_same_folder_is_refused",
    "changed_data_and_weights_are_other_settings",
    "exchanged_pictures_are_not_summed_up_together",
    "a_folder_of_an_older_version_goes_on",
    "two_processes_do_not_share_a_folder",
    "broken_folders_are_refused",
    "marks_come_after_the_answers_and_are_kept",
    "a_setting_may_differ_in_its_last_digits",
)
_SWEEP = _of(
    "evaluate/test_evaluate.py",
    "a_sweep_tells_the_parts_of_a_benchmark_apart",
    "the_parts_of_captions_are_scored_as_parts_of_the_whole",
    "sweep_and_report",
    "reports_leave_out_what_is_no_evaluation",
    "reports_keep_apart_what_differs",
)
_STUDY = _of(
    "flow/test_flow_experiments.py",
    "saliency_rows_are_what_saliency_says",
    "knockout_rows_are_what_knockouts_leave",
    "a_summary_is_read_back_as_it_was_written",
    "the_control_is_drawn_from_the_seed",
    "a_blank_picture_has_the_size_and_shows_nothing",
    "samples_are_first_asked_about_a_blank_picture",
    "a_broken_image_fails_alone_and_is_tried_again",
    "nothing_left_is_told_of",
    "commands_write_figures_and_a_verdict",
)
_VERDICTS = ("tests/flow/test_flow_verdicts.py",)
_DRAWN = ("tests/figures/test_figures.py",)
_RECORDS = ("tests/records/test_files.py", "tests/records/test_schema.py")
_CACHE = ("tests/engine/test_pruned_cache.py", "tests/engine/test_generate.py")
_PREFILL = ("tests/engine/test_oracles.py", "tests/engine/test_attach.py", "tests/engine/test_prompt.py")

TESTS: dict[str, tuple[str, ...]] = {  # by file below the package: those that ought to notice, in about a minute
    "core/attention.py": ("tests/core/test_attention.py",),
    "core/cost.py": _COST,
    "core/errors.py": ("tests/core/test_cost.py", "tests/cli/test_main.py"),
    "core/families.py": _FAMILIES,
    "core/geometry.py": _FAMILIES,
    "core/grids.py": ("tests/core/test_grids.py",),
    "core/images.py": ("tests/core/test_images.py",),
    "core/layout.py": ("tests/core/test_layout.py",),
    "core/select.py": ("tests/core/test_select.py",),
    "core/statistics.py": ("tests/core/test_statistics.py",),
    "core/widths.py": _FAMILIES,
    "records/files.py": _RECORDS,
    "records/folder.py": (*_RECORDS, *_RUN),
    "records/schema.py": (*_RECORDS, "tests/speed/test_latency.py"),
    "records/table.py": ("tests/evaluate/test_tables.py",),
    "pruners/controls.py": _METHOD,
    "pruners/fastv.py": _METHOD,
    "pruners/himap.py": _METHOD,
    "pruners/method.py": _METHOD,
    "pruners/outside.py": ("tests/pruners/test_pruners_outside.py",),
    "pruners/pyramiddrop.py": _METHOD,
    "pruners/table.py": ("tests/pruners/test_pruners.py", "tests/pruners/test_pruners_outside.py"),
    "pruners/vtw.py": _METHOD,
    "figures/analysis.py": _DRAWN,
    "figures/comparison.py": _DRAWN,
    "figures/maps.py": _DRAWN,
    "figures/style.py": (*_DRAWN, *_of("flow/test_flow_experiments.py", "figures_show_every_curve")),
    "engine/cache.py": _CACHE,
    "engine/calls.py": ("tests/engine/test_calls.py",),
    "engine/narrow.py": _CACHE,
    "engine/prefill.py": _PREFILL,
    "engine/probe.py": ("tests/engine/test_probe.py",),
    "engine/prompt.py": ("tests/engine/test_prompt.py",),
    "engine/ranking.py": _PREFILL,
    "engine/session.py": ("tests/engine/test_sessions.py", *_PREFILL),
    "engine/tap.py": ("tests/engine/test_tap.py",),
    "engine/target.py": _PREFILL,
    "engine/trace.py": (
        "tests/engine/test_attach.py",
        *_of("core/test_cost_of_pruning.py", "a_batch_costs_its_samples", "a_text_alone_pays_for_no_ranking"),
    ),
    "speed/latency.py": ("tests/speed/test_latency.py",),
    "speed/synthetic.py": ("tests/speed/test_latency.py",),
    "evaluate/budgets.py": _BUDGETS,
    "evaluate/evaluation.py": _RUN,
    "evaluate/judge.py": ("tests/evaluate/test_judge.py",),
    "evaluate/model_facts.py": _RUN,
    "evaluate/rows.py": (*_RECORDS, *_RUN),
    "evaluate/runner.py": _RUN,
    "evaluate/shards.py": _RUN,
    "evaluate/sweep.py": _SWEEP,
    "evaluate/tables.py": ("tests/evaluate/test_tables.py", *_RECORDS),
    "flow/consistency.py": ("tests/flow/test_flow_consistency.py",),
    "flow/contributions.py": (*_VERDICTS, *_STUDY),
    "flow/knockout.py": ("tests/flow/test_knockout.py",),
    "flow/layers.py": _VERDICTS,
    "flow/prediction.py": _STUDY,
    "flow/saliency.py": ("tests/flow/test_saliency.py",),
    "flow/study.py": _STUDY,
    "flow/verdict.py": _VERDICTS,
    "flow/windows.py": (*_VERDICTS, *_STUDY),
    "flow/withdrawal.py": ("tests/flow/test_withdrawal.py",),
}

EQUIVALENT: list[tuple[str, str, str]] = [  # file, the change as a regular expression, why no test can notice
    ("core/attention.py", r"1 << 26", "how much memory an accelerator is given; a processor never gets there"),
    ("core/cost.py", r"zip\(self\.kv_bytes", "costs of as many layers, as `Cost.__add__` has made sure"),
    ("core/cost.py", r"- visible\(past\)", "visible pairs are counted of whole prompts alone, which have no past"),
    ("core/statistics.py", r"2_000_000", "how many resamples are drawn at once; the draws are the same"),
    ("core/statistics.py", r"np\.array\(\[number\[key\]", "numpy's own type for whole numbers"),
    ("core/widths.py", r"config\.scale_factor", "a single layer over merged patches: what is merged cancels out"),
    ("engine/cache.py", r"^continue → break", "layers come in order: where a cache has none, it has none behind"),
    ("*", r"^assert .*→ assert .*XX", "the words of an invariant of our own, which are promised to nobody"),
    ("evaluate/tables.py", r"\"[+]?\.1F\"", "a finite number's letters, of which it has none"),
    ("pruners/method.py", r"high - low > 1e-12", "two floats that are just so far apart"),
]
