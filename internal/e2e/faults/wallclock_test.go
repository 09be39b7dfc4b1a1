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

// wallClock finds what reads the date of the machine that a server runs on.
// What is measured with time.Since, Sub, Before and After is monotonic.
var wallClock = regexp.MustCompile(`(?:time\.Now\(\)|\bnow)\.(?:Unix\w*|UTC|Local|In|Format|Round|Truncate|AppendFormat|String)\(`)

// mayAskTheDate lists how often a file may, and why.
var mayAskTheDate = map[string]int{
	"core.go":                  1, // while Redis has never answered
	"meshdebug/gather.go":      1, // says when a page was made
	"internal/hub/hub.go":      1, // default of a Config whose user gives Redis's clock
	"internal/lease/resign.go": 1, // of its own end a server is certain, whatever the clocks say
}

// TestClocksOfServersDecideNothing: deadlines run on Redis's clock and on
// monotonic ones, so that servers whose dates are minutes apart agree. A bubble
// has one date for all; that nobody asks for it is seen in the source.
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
	assert.Equal(t, mayAskTheDate, found)
}
