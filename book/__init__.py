"""The tool that turns manuscripts into package, notebooks and sheets, and proves them fresh."""
