"""Words and messages: source, spans, frozen records, closed vocabularies, diagnostics and how they are shown."""
