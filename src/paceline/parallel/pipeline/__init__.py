"""Pipeline parallelism: in which order each rank runs the passes of its stages.

A schedule says it as data, `communicate` adds the transfers, `runtime` runs the outcome.
"""

from paceline.core.registry import NameTable

SCHEDULES = NameTable(
    "pipeline schedule",
    {
        "gpipe": "paceline.parallel.pipeline.gpipe:GPIPE",
        "one-f-one-b": "paceline.parallel.pipeline.one_f_one_b:ONE_F_ONE_B",
        "interleaved": "paceline.parallel.pipeline.interleaved:INTERLEAVED",
        "zero-bubble": "paceline.parallel.pipeline.zero_bubble_h1:ZERO_BUBBLE_H1",
        "zero-bubble-v": "paceline.parallel.pipeline.zero_bubble_v:ZERO_BUBBLE_V",
        "v-half": "paceline.parallel.pipeline.v_half:V_HALF",
    },
)
"""`pipeline.schedule` to its `paceline.parallel.pipeline.base.Schedule`."""
