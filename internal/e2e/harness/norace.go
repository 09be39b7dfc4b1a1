//go:build !race

package harness

// raceEnabled reports whether the race detector is on.
const raceEnabled = false

// gcPercent is how much garbage there may be: tests make little that lasts, and are a
// fifth faster with rare collections.
const gcPercent = 400
