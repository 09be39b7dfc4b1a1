package prose

import (
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestComments looks for marks in all Go files of the repository.
func TestComments(t *testing.T) {
	t.Parallel()
	root := os.DirFS("../..")
	files := 0
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if base := d.Name(); d.IsDir() && base != "." && (strings.HasPrefix(base, ".") || base == "testdata" || base == "node_modules") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		source, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		files++
		for _, f := range Find(name, source) {
			t.Error(f)
		}
		return nil
	})
	require.NoError(t, err)
	require.Greater(t, files, 100, "the repository was not found")
}

// TestFind checks marks and text that is none.
func TestFind(t *testing.T) {
	t.Parallel()
	marked := map[string]string{
		"a pronoun at the start":    "// Who asks gets an answer.",
		"after a preposition":       "// It is for who waits.",
		"what as a subject":         "// f returns a copy of what is left.",
		"a sentence with Where":     "// It waits. Where Redis is away it fails.",
		"across lines":              "// f sends it to what\n// is left behind, of what\n// comes.",
		"at the end of a line":      "var a int // made anew",
		"a replaced word":           "// The lane has a batch.",
		"... with a capital":        "// Patience ends.",
		"the old package":           "// see owner.Conn",
		"in an indented comment":    "func f() {\n\t// somebody waits\n}",
		"in the second comment":     "// fine\n\n// whom it concerns",
		"beside a quoted word":      `// "stray" is a label, and a stray is not`,
		"a list":                    "// Cases:\n//\n//   - nobody watches",
		"a noun that was a message": "// the beat came back",
	}
	for name, source := range marked {
		require.NotEmpty(t, Find("x.go", []byte("package x\n\n"+source+"\n")), name)
	}
	clean := map[string]string{
		"a question word inside": "// f checks what kind it is.",
		"a relative clause":      "// an operator who looks into Redis",
		"where as a place":       "// the directory where it is",
		"a heartbeat":            "// one heartbeat later",
		"a quoted value":         "// \"stray\" is a label, and `lane` code",
		"a string":               `var s = "// anew"`,
		"code in a comment":      "// Example:\n//\n//\tlane.reap()",
		"a directive":            "//go:generate lane",
		"the owner of an entry":  "// It has an owner. The owner decides.",
		"separate comments":      "var a int // what\nvar b int // is left",
	}
	for name, source := range clean {
		require.Empty(t, Find("x.go", []byte("package x\n\n"+source+"\n")), name)
	}
}
