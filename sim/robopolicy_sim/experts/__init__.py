"""Scripted experts: closed-loop policies on observations, one file for each task; none needs MuJoCo."""
