"""What `when` rules do: their conditions and actions, and what they set in place of the spec's own numbers."""
