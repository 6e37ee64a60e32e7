"""Simulated training steps over many ranks: discrete events over the schedules that the project carries out."""
