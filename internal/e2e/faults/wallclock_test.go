package faults

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// wallClock matches code that reads the date of the server's machine. Durations that
// are measured with time.Since, Sub, Before and After are monotonic.
var wallClock = regexp.MustCompile(`(?:time\.Now\(\)|\bnow)\.(?:Unix\w*|UTC|Local|In|Format|Round|Truncate|AppendFormat|String)\(`)

// wallClockUses lists the number of uses that a file may have, with the reason.
var wallClockUses = map[string]int{
	"core.go":                  1, // until Redis has answered for the first time
	"meshdebug/gather.go":      1, // the time at which a page was made
	"internal/hub/hub.go":      1, // the default of a Config field
	"internal/lease/resign.go": 1, // a server knows its own end, whatever the clocks show
}

// TestClocksOfServersDecideNothing checks that deadlines use the clock of Redis and
// monotonic clocks, so that the dates of servers may differ by minutes. All servers of
// a synctest bubble have the same date, so the test searches the source.
func TestClocksOfServersDecideNothing(t *testing.T) {
	t.Parallel()
	found := make(map[string]int)
	root := harness.InModule()
	skipped := []string{"bench", "examples", "meshtest", "internal/redistest", "internal/e2e"}
	require.NoError(t, filepath.WalkDir(root, func(from string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path, err := filepath.Rel(root, from)
		switch {
		case err != nil:
			return err
		case d.IsDir() && slices.Contains(skipped, filepath.ToSlash(path)):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(from)
		if n := len(wallClock.FindAll(text, -1)); n > 0 {
			found[filepath.ToSlash(path)] = n
		}
		return err
	}))
	assert.Equal(t, wallClockUses, found)
}
