"""attention_with_kvcache: numbers, cache contents, arguments, memory."""
