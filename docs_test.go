package mesh

import (
	"go/ast"
	"go/doc"
	"go/doc/comment"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// withoutExample are the functions and methods that need none, each with the
// reason.
var withoutExample = map[string]string{
	"CommandError.Error":          "of the interface error",
	"ProgressError.Error":         "of the interface error",
	"ProgressError.Unwrap":        "for errors.Is",
	"Refusal.Error":               "of the interface error",
	"Refusal.Unwrap":              "for errors.Is",
	"Pattern.String":              "for messages",
	"NewHistogram":                "for tests of collectors; used in ExampleHistogram_Quantile",
	"Histogram.Count":             "says what it is; used in ExampleHistogram_Buckets",
	"Histogram.Sum":               "says what it is; used in ExampleHistogram_Quantile",
	"Histogram.MarshalJSON":       "of the interface json.Marshaler",
	"Connection.ID":               "says what it is; used in ExampleConnection_Member",
	"Connection.RemoteAddr":       "says what it is",
	"Server.Presence":             "leads to a manager: its methods have examples",
	"Server.Connections":          "leads to a manager: its methods have examples",
	"Server.Rooms":                "leads to a manager: its methods have examples",
	"PresenceManager.Connections": "leads to a manager: its methods have examples",
	"PresenceManager.Rooms":       "leads to a manager: its methods have examples",
}

// documentation reads a package as pkg.go.dev does.
func documentation(dir, path string) (*doc.Package, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range names {
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return doc.NewFromFiles(fset, files, path)
}

const modulePath = "github.com/meshpresence/mesh"

// rootOnce reads many files; the tests below share what it finds.
var rootOnce = sync.OnceValues(func() (*doc.Package, error) { return documentation(".", modulePath) })

func rootDocumentation(t *testing.T) *doc.Package {
	t.Helper()
	p, err := rootOnce()
	require.NoError(t, err)
	return p
}

// verbs calls see for every exported function and method.
func verbs(p *doc.Package, see func(name string, f *doc.Func)) {
	for _, f := range p.Funcs {
		see(f.Name, f)
	}
	for _, typ := range p.Types {
		for _, f := range typ.Funcs { // constructors
			see(f.Name, f)
		}
		for _, f := range typ.Methods {
			see(typ.Name+"."+f.Name, f)
		}
	}
}

// TestEveryVerbHasAnExample: what a user calls is shown on pkg.go.dev, in
// code that runs as a test.
func TestEveryVerbHasAnExample(t *testing.T) {
	t.Parallel()
	unused := make(map[string]bool)
	for name := range withoutExample {
		unused[name] = true
	}
	verbs(rootDocumentation(t), func(name string, f *doc.Func) {
		_, needsNone := withoutExample[name]
		delete(unused, name)
		switch {
		case len(f.Examples) == 0 && !needsNone:
			t.Errorf("%s has no Example", name)
		case len(f.Examples) > 0 && needsNone:
			t.Errorf("%s has an Example: it need not be among those without", name)
		}
	})
	assert.Empty(t, unused, "do not exist any more")
}

// TestExamplesAreChecked: an example without output would only be compiled.
func TestExamplesAreChecked(t *testing.T) {
	t.Parallel()
	p := rootDocumentation(t)
	require.Len(t, p.Examples, 1, "of the package")
	assert.NotNil(t, p.Examples[0].Play, "the package's example is to be a whole program")
	check := func(name string, examples []*doc.Example) {
		for _, e := range examples {
			assert.Truef(t, e.Output != "" || e.EmptyOutput, "Example of %s%s without output", name, e.Suffix)
			assert.NotEmptyf(t, e.Doc+e.Output, "Example of %s says nothing", name)
		}
	}
	check("the package", p.Examples)
	for _, typ := range p.Types {
		check(typ.Name, typ.Examples)
	}
	verbs(p, func(name string, f *doc.Func) { check(name, f.Examples) })
}

// TestEverythingIsDocumented: every exported name has a comment, and what is
// in brackets there is a link.
func TestEverythingIsDocumented(t *testing.T) {
	t.Parallel()
	packages := []*doc.Package{rootDocumentation(t)}
	for _, dir := range []string{"meshtest", "meshdebug", "meshprom"} {
		p, err := documentation(dir, modulePath+"/"+dir)
		require.NoError(t, err)
		packages = append(packages, p)
	}
	for _, p := range packages {
		check := func(name, text string) {
			assert.NotEmptyf(t, text, "%s: %s has no comment", p.Name, name)
			for _, link := range unresolved(p.Parser().Parse(text)) {
				t.Errorf("%s: %s: %s leads nowhere", p.Name, name, link)
			}
		}
		check("package", p.Doc)
		verbs(p, func(name string, f *doc.Func) { check(name, f.Doc) })
		values := append(slices.Clone(p.Consts), p.Vars...)
		for _, typ := range p.Types {
			check(typ.Name, typ.Doc)
			values = append(append(values, typ.Consts...), typ.Vars...)
			eachField(typ.Decl, func(name, text string) {
				for _, link := range unresolved(p.Parser().Parse(text)) {
					t.Errorf("%s: %s.%s: %s leads nowhere", p.Name, typ.Name, name, link)
				}
			})
		}
		for _, v := range values {
			check(v.Names[0], v.Doc)
		}
	}
}

// eachField calls see with the comment of each field of a struct type.
func eachField(decl *ast.GenDecl, see func(name, text string)) {
	ast.Inspect(decl, func(n ast.Node) bool {
		if f, ok := n.(*ast.Field); ok && len(f.Names) > 0 {
			see(f.Names[0].Name, f.Doc.Text()+f.Comment.Text())
		}
		return true
	})
}

var inBrackets = regexp.MustCompile(`\[\*?[A-Za-z]+(\.[A-Za-z]+)*\]`)

// unresolved returns what looks like a link in a comment and is only text.
func unresolved(d *comment.Doc) []string {
	var out []string
	texts := func(list []comment.Text) {
		for _, x := range list {
			if plain, ok := x.(comment.Plain); ok {
				out = append(out, inBrackets.FindAllString(string(plain), -1)...)
			}
		}
	}
	var blocks func([]comment.Block)
	blocks = func(list []comment.Block) {
		for _, b := range list {
			switch b := b.(type) {
			case *comment.Paragraph:
				texts(b.Text)
			case *comment.Heading:
				texts(b.Text)
			case *comment.List:
				for _, item := range b.Items {
					blocks(item.Content)
				}
			}
		}
	}
	blocks(d.Content)
	return out
}
