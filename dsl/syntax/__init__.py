"""From text to a tree: the Lark grammar, its LALR(1) parser, recovery by statement, messages on syntax."""
