"""The engine plugin: both levers, per request, inside an unmodified vLLM."""
