package callbacks

import (
	"context"
	"crypto/tls"
	"database/sql/driver"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/url"
	"slices"
	"syscall"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/errs"
)

// outageErrors are errors of a dependency that did not answer.
var outageErrors = []error{
	context.Canceled, context.DeadlineExceeded, errs.Unavailable, net.ErrClosed, io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe,
	redis.ErrClosed, redis.ErrPoolTimeout, driver.ErrBadConn,
}

// IsOutage reports whether an error wraps an error of a context, a network, or a
// database that did not answer. Such an error says nothing about the client.
func IsOutage(err error) bool {
	if WrapsTooMany(err) { // errors.Is might not end
		return false
	}
	return slices.ContainsFunc(outageErrors, func(o error) bool { return errors.Is(err, o) }) || AnyWrapped(err, isNetworkError)
}

// isNetworkError looks at one error and not at those that it wraps. Errors of parsers
// implement net.Error, too, but they are about the parsed text, which the client may
// have sent. The same holds for errors about the name of a file.
func isNetworkError(err error) bool {
	switch e := err.(type) { // one error, not those that it wraps
	case *net.ParseError, *net.AddrError, net.InvalidAddrError, net.UnknownNetworkError:
		return false
	case syscall.Errno:
		return !slices.Contains(fileNameErrors, e) && !errors.Is(e, fs.ErrNotExist) && !errors.Is(e, fs.ErrExist)
	case *url.Error:
		return e.Op != "parse"
	case *tls.CertificateVerificationError, tls.RecordHeaderError:
		return true
	case redis.Error:
		return e != redis.Nil
	case net.Error: // system call errors, too
		return true
	case interface{ SQLState() string }:
		return isSQLOutage(e.SQLState())
	case interface{ Timeout() bool }:
		return e.Timeout()
	}
	return false
}

// fileNameErrors are errors about the name of a file. A hook may look for a session in
// a file that is named after text from the client.
var fileNameErrors = []syscall.Errno{syscall.ENOTDIR, syscall.EISDIR, syscall.EINVAL, syscall.ENAMETOOLONG, syscall.ELOOP}

// sqlOutages are the classes of SQLSTATE that do not depend on a query's values:
// connection exceptions, a rejected user of the database, too few resources, shutdowns
// and timeouts, system errors, internal errors.
var sqlOutages = []string{"08", "28", "53", "57", "58", "XX"}

// isSQLOutage reports whether an SQLSTATE, as PostgreSQL drivers return it, means an
// outage.
func isSQLOutage(state string) bool {
	return len(state) == 5 && slices.Contains(sqlOutages, state[:2])
}
