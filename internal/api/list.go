package api

import (
	"fmt"
	"go/types"
	"sort"
	"strings"
)

// list returns one sorted line per exported constant, variable, function, type, struct
// field, interface method and method of pkg. Types are written as seen from pkg.
// Parameter names are left out, because they are not part of the API.
func list(pkg *types.Package) []string {
	l := &lister{pkg: pkg}
	for _, name := range pkg.Scope().Names() {
		if obj := pkg.Scope().Lookup(name); obj.Exported() {
			l.object(obj)
		}
	}
	sort.Strings(l.lines)
	return l.lines
}

type lister struct {
	pkg   *types.Package
	lines []string
}

func (l *lister) add(format string, args ...any) {
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *lister) object(obj types.Object) {
	switch obj := obj.(type) {
	case *types.Const:
		l.add("const %s %s = %s", obj.Name(), l.text(obj.Type()), obj.Val().ExactString())
	case *types.Var:
		l.add("var %s %s", obj.Name(), l.text(obj.Type()))
	case *types.Func:
		l.add("func %s%s", obj.Name(), l.signature(obj))
	case *types.TypeName:
		l.typeName(obj)
	}
}

func (l *lister) typeName(obj *types.TypeName) {
	if alias, ok := obj.Type().(*types.Alias); ok {
		l.add("type %s = %s", obj.Name(), l.text(alias.Rhs()))
		return
	}
	named := obj.Type().(*types.Named)
	name := obj.Name() + l.typeParams(named)
	switch t := named.Underlying().(type) {
	case *types.Struct:
		l.add("type %s struct", name)
		l.fields(obj.Name(), t)
	case *types.Interface:
		l.add("type %s interface", name)
		l.interfaceMethods(obj.Name(), t)
		return // the method set of an interface would repeat this
	default:
		l.add("type %s %s", name, l.text(t))
	}
	l.methods(named)
}

func (l *lister) fields(name string, t *types.Struct) {
	for i := range t.NumFields() {
		field := t.Field(i)
		if inner, ok := field.Type().Underlying().(*types.Struct); ok && field.Embedded() && !field.Exported() {
			l.fields(name, inner) // promoted fields can be used by name
		}
		if !field.Exported() {
			continue
		}
		line := field.Name() + " " + l.text(field.Type())
		if field.Embedded() {
			line = "embedded " + l.text(field.Type())
		}
		if tag := t.Tag(i); tag != "" {
			line += fmt.Sprintf(" %q", tag)
		}
		l.add("type %s struct, %s", name, line)
	}
}

func (l *lister) interfaceMethods(name string, t *types.Interface) {
	closed := false
	for i := range t.NumMethods() {
		if m := t.Method(i); m.Exported() {
			l.add("type %s interface, %s%s", name, m.Name(), l.signature(m))
		} else {
			closed = true
		}
	}
	if closed {
		l.add("type %s interface, unexported methods", name)
	}
}

// methods lists the methods of named, including promoted ones.
func (l *lister) methods(named *types.Named) {
	values := types.NewMethodSet(named)
	all := types.NewMethodSet(types.NewPointer(named))
	for i := range all.Len() {
		m := all.At(i).Obj().(*types.Func)
		if !m.Exported() {
			continue
		}
		receiver := "*" + named.Obj().Name()
		if values.Lookup(m.Pkg(), m.Name()) != nil {
			receiver = named.Obj().Name()
		}
		l.add("method (%s) %s%s", receiver, m.Name(), l.signature(m))
	}
}

func (l *lister) typeParams(named *types.Named) string {
	var params []string
	for i := range named.TypeParams().Len() {
		p := named.TypeParams().At(i)
		params = append(params, p.Obj().Name()+" "+l.text(p.Constraint()))
	}
	if params == nil {
		return ""
	}
	return "[" + strings.Join(params, ", ") + "]"
}

func (l *lister) signature(f *types.Func) string {
	return strings.TrimPrefix(l.text(f.Type()), "func")
}

func (l *lister) text(t types.Type) string {
	return types.TypeString(nameless(t), func(p *types.Package) string {
		if p == l.pkg {
			return ""
		}
		return p.Name()
	})
}

// nameless removes the names of parameters and results from t. It leaves a generic
// function as it is, because its type parameters cannot be bound a second time.
func nameless(t types.Type) types.Type {
	switch t := t.(type) {
	case *types.Pointer:
		return types.NewPointer(nameless(t.Elem()))
	case *types.Slice:
		return types.NewSlice(nameless(t.Elem()))
	case *types.Map:
		return types.NewMap(nameless(t.Key()), nameless(t.Elem()))
	case *types.Chan:
		return types.NewChan(t.Dir(), nameless(t.Elem()))
	case *types.Signature:
		if t.TypeParams().Len() > 0 {
			return t
		}
		return types.NewSignatureType(nil, nil, nil, tuple(t.Params()), tuple(t.Results()), t.Variadic())
	}
	return t
}

func tuple(t *types.Tuple) *types.Tuple {
	var vars []*types.Var
	for i := range t.Len() {
		vars = append(vars, types.NewParam(0, nil, "", nameless(t.At(i).Type())))
	}
	return types.NewTuple(vars...)
}
