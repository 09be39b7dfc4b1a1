package bench

import "slices"

// median returns the median of what was measured, 0 of nothing.
func median(list []float64) float64 {
	if len(list) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(list))[len(list)/2]
}

// worst returns the largest, 0 of nothing.
func worst(list []float64) float64 {
	if len(list) == 0 {
		return 0
	}
	return slices.Max(list)
}
