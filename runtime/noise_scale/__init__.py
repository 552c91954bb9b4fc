"""The gradient noise scale: estimators, averages, intervals, calibration, its action and its pictures."""
