"""Rows on disk to prompts in memory."""
