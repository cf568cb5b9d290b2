"""How thin factors may begin: one module for each start, and for what they need of each other. They belong to no method."""
