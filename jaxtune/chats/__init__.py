"""Conversations as text and tokens: messages, chat templates and targets."""
