"""What a plan is: frozen data by adapter and by site, with its JSON, its text, its cost, and how a model differs from it.

Made by the passes; read by everything that comes after the compiler.
"""
