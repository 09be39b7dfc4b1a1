//go:build race

package sim

// simDefault is the default number of seeds. A seed takes ten times as long with the
// race detector.
const simDefault = 20
