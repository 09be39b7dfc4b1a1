//go:build !race

package harness

// raceEnabled reports whether the race detector is on.
const raceEnabled = false

// gcPercent is the garbage collector's target. Tests keep little memory, and are a
// fifth faster with rare collections.
const gcPercent = 400
