"""Measuring a model: choosing among given answers, and comparing texts."""
