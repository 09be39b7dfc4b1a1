// Package browsertest tests the page of whoshere in headless Chromium, with two browsers,
// two servers and one Redis. It is a module of its own, so that the library's module
// needs no browser driver.
//
//	go test ./...
//	go test -run TestPicture -picture ../../../docs/whoshere.png
//
// Without Chromium or a redis-server the tests are skipped. With MESH_REQUIRE_BROWSER=1
// and MESH_REQUIRE_REDIS=1 they fail instead. MESH_CHROMIUM names another browser of that
// family.
package browsertest
