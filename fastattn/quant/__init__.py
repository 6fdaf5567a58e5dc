"""Low-bit weights and activations: layouts in memory (`packed`), formats of few bits (`mx`), messages between
ranks (`message`, `codec`), formats on disk (`gptq`, `awq`, `compressed`; `words` packs, `grouped` leads from
there to `packed`).

`packed`, `mx` and `message` hold facts and exact conversions only; they import `spec` and each other, and
every layer may use them. `codec` runs on the backends.
"""
