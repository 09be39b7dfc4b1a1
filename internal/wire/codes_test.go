package wire

import (
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// codesIn returns the first group of every match of pattern in a file.
func codesIn(t *testing.T, file, pattern string) []string {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	var codes []string
	for _, m := range regexp.MustCompile(pattern).FindAllSubmatch(text, -1) {
		codes = append(codes, string(m[1]))
	}
	return codes
}

// The table of codes, the documents and the label values of the metrics agree.
func TestCodesAreDocumented(t *testing.T) {
	t.Parallel()
	codes := codesIn(t, "codes.go", `(?m)^\tCode\w+ += "(E[A-Z]+)"`)
	require.Len(t, codes, 13)
	require.Equal(t, codes, codesIn(t, "../../docs/wire-protocol.md", "(?m)^\\| `(E[A-Z]+)` \\|"))

	// The commands that are counted by code never find that a connection exists, or that
	// a room is full.
	counted := slices.DeleteFunc(slices.Clone(codes), func(code string) bool { return code == CodeExists || code == CodeFull })
	require.Subset(t, codesIn(t, "../../meshprom/table.go", `"(E[A-Z]+)"`), counted)
	require.Subset(t, codesIn(t, "../../meshprom/README.md", `\b(E[A-Z]{3,})\b`), counted)
}
