"""Text -> tree: the Lark grammar, Lark's LALR(1) parser over it, recovery by statement, tree, syntax errors."""
