//go:build race

package harness

// raceEnabled reports whether the race detector is on.
const raceEnabled = true

// gcPercent is the garbage collector's target. The race detector needs several times
// the memory.
const gcPercent = 100
