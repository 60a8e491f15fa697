"""Chats as text: the template, its arguments and date, and the proof that every message arrives."""
