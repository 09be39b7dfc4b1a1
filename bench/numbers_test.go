package bench

import "slices"

// median returns the median of a list, or 0 if it is empty.
func median(list []float64) float64 {
	if len(list) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(list))[len(list)/2]
}

// worst returns the largest number, or 0 if the list is empty.
func worst(list []float64) float64 {
	if len(list) == 0 {
		return 0
	}
	return slices.Max(list)
}
